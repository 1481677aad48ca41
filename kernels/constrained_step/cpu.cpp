// SPDX-License-Identifier: Apache-2.0
// One step of beam search over a trie of codes: for each user, a loop over beams and their children, of which the best so far are kept.
//
// Children lie in a row, so that what is closed for the user is met in one walk beside them. A child that may be among the best waits in
// a room of twice the width; when that is full, its best stay and the bar moves up, which hardly any child passes then.
#include <functional>

#include "native.h"

using native::key_of;
using native::score_of;

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Hit {
  uint64_t key;
  int64_t beam;
  bool operator<(const Hit& other) const { return key != other.key ? key > other.key : beam < other.beam; }  // the better one first
};

// The k best so far.
class Best {
 public:
  explicit Best(size_t k) : k_(k), room_(std::max<size_t>(2 * k, 128)) {}
  void clear() {
    hits_.clear();
    bar_ = kNone;
  }
  bool may_pass(float score) const { return !(score < bar_); }
  void add(Hit hit) {
    hits_.push_back(hit);
    if (hits_.size() >= room_) {
      cut();
      bar_ = score_of(hits_[k_ - 1].key);
    }
  }
  const std::vector<Hit>& cut() {
    if (hits_.size() > k_) {
      std::nth_element(hits_.begin(), hits_.begin() + int64_t(k_ - 1), hits_.end());
      hits_.resize(k_);
    }
    return hits_;
  }
  const std::vector<Hit>& sorted() {
    cut();
    std::sort(hits_.begin(), hits_.end());
    return hits_;
  }

 private:
  size_t k_, room_;
  std::vector<Hit> hits_;
  float bar_ = kNone;
};

struct Step {
  const float* log_probs;  // of user b after beam w, a row of `codes` at b * user_stride + w * beam_stride
  int64_t user_stride, beam_stride, codes;
  const int64_t* nodes;  // [users, beams]
  const float* scores;   // [users, beams]
  int64_t users, beams;
  const int64_t* first_child;  // [parents + 1]
  int64_t parents;
  const int64_t* code_of;  // [size]
  int64_t size;
  const uint8_t* alive;           // [size], or null
  const int64_t* closed_offsets;  // [users + 1], or null
  const int64_t* closed;          // ascending within a user
  int64_t width, children;        // 0 children: all
  bool renormalise;
  int64_t* out_nodes;  // [users, width], as the next two
  float* out_scores;
  int64_t* out_parents;
  uint8_t* out_cut;  // [users]
};

// How many children all beams have; -1 if one stands at no node of the trie.
int64_t count(const Step& step) {
  int64_t total = 0;
  for (int64_t place = 0; place < step.users * step.beams; ++place) {
    if (!(step.scores[place] > kNone)) continue;
    const int64_t node = step.nodes[place];
    if (node < 0 || node >= step.parents) return -1;
    const int64_t first = step.first_child[node], end = step.first_child[node + 1];
    if (first < 0 || end < first || end > step.size) return -1;
    total += end - first;
  }
  return total;
}

// What renormalisation takes off each child: the logarithm of the sum, 0 where that is not finite.
float log_sum(const std::vector<float>& found) {
  float most = kNone;
  for (float value : found) most = std::max(most, value);
  double sum = 0;
  for (float value : found) sum += double(std::exp(value - most));
  const double total = double(most) + std::log(sum);
  return std::isfinite(total) ? float(total) : 0.0f;
}

// One user; false if a child has a code that there is no log-probability for.
bool run(const Step& step, int64_t user, Best& best, Best& of_beam, std::vector<float>& found) {
  best.clear();
  int64_t opened = 0;
  bool cut = false;
  const int64_t* closed_end = step.closed_offsets ? step.closed + step.closed_offsets[user + 1] : nullptr;
  for (int64_t beam = 0; beam < step.beams; ++beam) {
    const float score = step.scores[user * step.beams + beam];
    if (!(score > kNone)) continue;
    const int64_t node = step.nodes[user * step.beams + beam];
    const int64_t first = step.first_child[node], end = step.first_child[node + 1];
    const float* row = step.log_probs + user * step.user_stride + beam * step.beam_stride;
    found.resize(size_t(end - first));
    for (int64_t child = first; child < end; ++child) {
      const int64_t code = step.code_of[child];
      if (code < 0 || code >= step.codes) return false;
      found[size_t(child - first)] = row[code];
    }
    const float shift = step.renormalise ? log_sum(found) : 0.0f;
    const int64_t* closed = closed_end ? std::lower_bound(step.closed + step.closed_offsets[user], closed_end, first) : nullptr;
    Best& into = step.children ? of_beam : best;
    if (step.children) of_beam.clear();
    int64_t own = 0;
    for (int64_t child = first; child < end; ++child) {
      const bool is_closed = closed != closed_end && *closed == child;
      if (is_closed) ++closed;
      const float sum = (found[size_t(child - first)] - shift) + score;
      if (is_closed || (step.alive && !step.alive[child]) || sum == kNone) continue;
      ++own;
      if (into.may_pass(sum)) into.add({key_of(sum, uint32_t(child)), beam});
    }
    if (step.children) {
      for (const Hit& hit : of_beam.cut())
        if (best.may_pass(score_of(hit.key))) best.add(hit);
      cut |= own > step.children;
      own = std::min(own, step.children);
    }
    opened += own;
  }
  const std::vector<Hit>& hits = best.sorted();
  for (int64_t place = 0; place < step.width; ++place) {
    const bool there = place < int64_t(hits.size());
    const int64_t at = user * step.width + place;
    step.out_nodes[at] = there ? int64_t(0xFFFFFFFFu - uint32_t(hits[size_t(place)].key)) : 0;
    step.out_scores[at] = there ? score_of(hits[size_t(place)].key) : kNone;
    step.out_parents[at] = there ? hits[size_t(place)].beam : 0;
  }
  step.out_cut[user] = cut || opened > step.width;
  return true;
}

}  // namespace

// See Step. Returns 0; 1 if a beam stands at no node of the trie; 2 if a child's code has no log-probability.
extern "C" int64_t constrained_step(const float* log_probs, int64_t user_stride, int64_t beam_stride, int64_t codes, const int64_t* nodes,
                                    const float* scores, int64_t users, int64_t beams, const int64_t* first_child, int64_t parents,
                                    const int64_t* code_of, int64_t size, const uint8_t* alive, const int64_t* closed_offsets,
                                    const int64_t* closed, int64_t width, int64_t children, int64_t renormalise, int64_t threads,
                                    int64_t* out_nodes, float* out_scores, int64_t* out_parents, uint8_t* out_cut) {
  const Step step{log_probs, user_stride, beam_stride, codes, nodes,   scores, users,    beams,            first_child, parents,    code_of,     size,
                  alive,     closed_offsets, closed,   width, children, renormalise != 0, out_nodes, out_scores, out_parents, out_cut};
  const int64_t total = count(step);
  if (total < 0) return 1;
  constexpr int64_t kShare = 1 << 14;  // children that are worth a thread
  threads = std::max<int64_t>(1, std::min({threads, users, total / kShare}));
  std::atomic<bool> known{true};
  native::parallel_for(threads, threads, [&](int64_t thread) {
    Best best(static_cast<size_t>(width)), of_beam(size_t(std::max<int64_t>(children, 1)));
    std::vector<float> found;
    for (int64_t user = users * thread / threads; user < users * (thread + 1) / threads; ++user)
      if (!run(step, user, best, of_beam, found)) known = false;
  });
  return known ? 0 : 2;
}
