// SPDX-License-Identifier: Apache-2.0
// Reads the server's metrics in Prometheus' text format, and what happened between two readings.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ROUTES = new Set(["/v1/recommend", "/v1/rank", "/page/what-if"]);

export function parse(text) {
  return text.split("\n").flatMap((line) => {
    const found = LINE.exec(line);
    if (!found) return [];
    const labels = Object.fromEntries([...(found[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
    return [{ name: found[1], labels, value: Number(found[3]) }];
  });
}

/** The bounds of the latencies' buckets with their cumulated counts, of the routes that give lists. */
function buckets(samples) {
  const counts = new Map();
  for (const { name, labels, value } of samples) {
    if (name !== "recsys_request_seconds_bucket" || !ROUTES.has(labels.route)) continue;
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/** The bound in milliseconds below which a share of the requests ended; null where there were none. */
function quantile(counts, share) {
  const total = counts.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const bound = counts.find(([, count]) => count >= share * total)[0];
  return 1000 * (bound === Infinity ? counts.at(-2)[0] : bound);
}

const sum = (samples, name) => samples.filter((sample) => sample.name === name).reduce((total, { value }) => total + value, 0);

/** What to show of two readings {samples, at}; the quantiles are of all requests where none came between them. */
export function summary(now, before) {
  const all = buckets(now.samples);
  const earlier = new Map(before ? buckets(before.samples) : []);
  const recent = all.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  const fresh = recent.at(-1)?.[1] ?? 0;
  // A server that was started again counts from zero.
  const usable = before && fresh > 0 ? recent : all;
  return {
    rate: before ? Math.max(0, fresh) / ((now.at - before.at) / 1000) : null,
    p50: quantile(usable, 0.5),
    p99: quantile(usable, 0.99),
    rejected: sum(now.samples, "recsys_rejected_total"),
    waiting: sum(now.samples, "recsys_requests_waiting"),
    flagged: now.samples.filter(({ name }) => name === "recsys_flagged_total").map(({ labels, value }) => [labels.flag, value]),
  };
}
