# SPDX-License-Identifier: Apache-2.0
"""The shapes at which the shipped recipes call each op: what must compile ahead of time and what benchmarks measure."""

from kernels.op import Shape

# rms_norm: (rows, width). Rows are batch x tokens: serving and training batches; the last is the widest row the kernel takes.
# square_sums: (batch, tokens, parts of a token, width of a part): TokenMixer-Large, whose parts are those that mixed tokens are made of.
# token_swiglu: (batch, tokens, width, hidden): serving and training batches of TokenMixer-Large; a fifth number has mixed tokens of so many
# parts.
# log_sinkhorn: (matrices, n, iterations, whether symmetric): the global matrix and the local ones of UniMixer's mixers.
# jagged_attention: a `kernels.jagged_attention.shape.Case`: SASRec, HSTU as retriever and over a ranker's history, RecGPT, SETRec; the
# last is the widest head that the kernels take.
# fsq: (items, slots, form (0 tanh, 1 sigmoid), levels …): RecGPT's item tokenizer, a batch of its training and a whole catalogue.
# selected_attention: a `kernels.selected_attention.shape.Case`: a step of FASA or TokenSelect, the same with grouped heads, DHSA's blocks
# of a prompt, and a retriever's histories of which a choice for all queries was made; the last has the widest heads that the kernels take.
# paged_scores: (heads, key heads, width, pages, slots of each row …): a step of TokenSelect for one history, and for a batch of short ones.
# int8_pooling: (rows of the table, width, bags, values): a request's candidates and a batch of training's size, ten values a bag.
# constrained_step: (users, beams, codes, nodes, width, children of a beam, whether renormalised): RecGPT's published search, TIGER's beams,
# and beams that were widened for a user who lacks items.
# gather_topk: (users, slots, codes of a slot, items, k): a batch over RecGPT's codes, one over RPG's, and the longest list of the kernel.
# catalogue_log_partition: (states, slots, candidates, width of a slot): SASRec and HSTU, a million items, SETRec, RecGPT's heads.
# routed_experts: (tokens, batch, width, hidden, experts, choices, whether GELU): serving and training batches of TokenMixer-Large, whose
# shared expert is not among them; RankMixer in serving, where every expert is a choice. routed_experts_quantized: likewise, in
# serving, and whether of float8.
RECIPES: dict[str, tuple[Shape, ...]] = {
    "rms_norm": ((100 * 8, 64), (512 * 8, 64), (2048 * 16, 256), (2048 * 16, 512), (2048 * 32, 1024), (1024, 4096)),
    "square_sums": ((512, 8, 8, 8), (2048, 16, 16, 32), (2048, 32, 32, 32)),
    "token_swiglu": (
        *((100, 8, 64, 128), (512, 8, 64, 128), (2048, 16, 256, 512), (2048, 16, 512, 1024), (2048, 32, 1024, 2048)),
        *((512, 8, 64, 128, 8), (2048, 16, 512, 1024, 16)),
    ),
    "log_sinkhorn": ((1, 16, 20, 1), (1, 64, 20, 1), (64, 8, 20, 1), (128, 32, 20, 1)),
    "jagged_attention": (
        (32, 200, 2, 32, 0, 0, 1, 0, 0),
        (32, 50, 2, 32, 1, 0, 1, 1, 50),
        (512, 400, 4, 64, 1, 0, 1, 1, 400),
        (64, 200, 6, 32, 0, 1, 4, 0, 0),
        (128, 250, 2, 32, 0, 2, 5, 0, 0),
        (64, 2048, 4, 128, 0, 0, 1, 0, 0),
    ),
    "fsq": ((256, 4, 0, 8, 8, 8, 6, 5), (256, 4, 0, 8, 5, 5), (1_000_000, 4, 0, 8, 5, 5, 5), (1_000_000, 4, 1, 8, 5, 5, 5)),
    "int8_pooling": ((100_000, 32, 100, 1_000), (100_000, 64, 512, 5_120), (1_000_000, 64, 2048, 20_480), (1_000_000, 128, 2048, 20_480)),
    "constrained_step": ((32, 20, 1000, 20_000, 20, 5, 0), (64, 50, 256, 60_000, 50, 0, 1), (4, 1000, 256, 60_000, 1000, 0, 0)),
    "gather_topk": ((64, 4, 15_360, 1_000_000, 50), (64, 32, 256, 1_000_000, 100), (8, 4, 256, 1_000_000, 1024)),
    "catalogue_log_partition": ((2000, 1, 12_101, 64), (512, 1, 1_000_000, 64), (1500, 3, 4000, 64), (6000, 1, 1000, 192)),
    "routed_experts": (
        (8, 100, 64, 16, 7, 3, 0),
        (8, 512, 64, 16, 7, 3, 0),
        (16, 2048, 256, 64, 7, 3, 0),
        (31, 1024, 1536, 384, 7, 3, 0),
        (8, 100, 64, 64, 4, 4, 1),
    ),
    "routed_experts_quantized": (
        (8, 100, 64, 16, 7, 3, 0, 0),
        (16, 128, 256, 64, 7, 3, 0, 0),
        (31, 100, 1536, 384, 7, 3, 0, 0),
        (8, 100, 64, 64, 4, 4, 1, 0),
        (16, 128, 256, 64, 7, 3, 0, 1),
        (31, 100, 1536, 384, 7, 3, 0, 1),
    ),
    "selected_attention": (
        (1, 8, 8, 1, 32_768, 8, 1, 1024, 128, 128, 0),
        (1, 8, 2, 1, 32_768, 1, 1, 1024, 128, 128, 0),
        (1, 4, 4, 4096, 4096, 1, 64, 1024, 64, 64, 1),
        (64, 2, 2, 200, 200, 1, 1, 50, 32, 32, 0),
        (1, 8, 2, 1024, 8192, 2, 16, 512, 128, 128, 1),
    ),
    "paged_scores": ((8, 8, 128, 65_536, 32_768), (8, 2, 128, 65_536, 32_768), (4, 4, 64, 65_536, *[4096] * 16)),
}
