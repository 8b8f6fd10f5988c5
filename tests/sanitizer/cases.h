// The calls the driver makes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "inputs.h"
#include "sm90/family.h"

namespace sanitizer {

// Adds cases of one head dim, element type and family: <feature>-<head dim>-<type>-<family>.
class Adder {
 public:
  Adder(std::vector<Case>& cases, int dim, jfa::ElementType type, std::string family)
      : dim(dim), type(type), cases_(cases), family_(std::move(family)) {}

  const int dim;
  const jfa::ElementType type;

  void operator()(const char* feature, const jfa::Shape& shape, const std::function<void(Case&)>& change) const {
    Case c;
    const char* of_type = type == jfa::ElementType::kHalf ? "-f16-" : "-bf16-";
    c.name = std::string(feature) + "-" + std::to_string(dim) + of_type + family_;
    c.family = family_;
    c.shape = shape;
    c.type = type;
    change(c);
    cases_.push_back(c);
  }

 private:
  std::vector<Case>& cases_;
  std::string family_;
};

// Of each batch entry the same: runs of `length` tokens with ids 0, 1, ...
inline std::vector<int> segments_in_runs(int batch, int tokens, int length) {
  std::vector<int> ids(size_t(batch) * tokens);
  for (size_t n = 0; n < ids.size(); ++n) ids[n] = int(n) % tokens / length;
  return ids;
}

// Every feature.
inline void add_features(const Adder& adder, int q_len, int k_len) {
  const int dim = adder.dim;
  const auto add = [&](const char* feature, const std::function<void(Case&)>& change) {
    adder(feature, {2, q_len, k_len, 2, 2, dim, dim}, change);
  };
  add("plain", [](Case& c) { c.d_lse = false; });
  add("causal", [](Case& c) { c.window.window_right = 0; });
  add("causal_bottom_right", [](Case& c) {
    c.window.window_right = 0;
    c.window.bottom_right = true;
  });
  add("window", [](Case& c) { c.window.window_left = 20, c.window.window_right = 5; });
  add("lengths", [=](Case& c) {
    c.shape.batch = 4;
    c.q_lengths = {q_len, 0, q_len / 2, q_len};
    c.k_lengths = {k_len / 3, k_len, 0, k_len};
  });
  add("bias", [=](Case& c) { c.bias = {1, 2, q_len, k_len}; });
  add("bias_of_keys", [=](Case& c) {
    c.bias = {2, 1, 1, k_len};
    c.bias_type = c.type;
    c.window.window_right = 0;
  });
  add("mask", [=](Case& c) { c.mask = {2, 1, q_len, k_len}; });
  add("device_scale", [](Case& c) { c.device_scale = {0.15f, -0.2f}; });
  add("soft_cap", [](Case& c) { c.soft_cap = 1.5f; });
  add("alibi", [](Case& c) {
    c.alibi_slopes = {0.1f, 0.02f, 0.0f, -0.01f};
    c.window.bottom_right = true;
  });
  add("sinks", [=](Case& c) {
    c.sinks = {0.5f, 4.0f};
    c.shape.q_len = k_len + 10;  // the last rows see no key
    c.window.window_left = 5, c.window.window_right = 0;
  });
  add("dropout", [](Case& c) {
    c.dropout_steps = 20000;
    c.window.window_left = 20;
  });
  add("gqa", [](Case& c) {
    c.shape.heads = 4;
    c.window.window_right = 0;
  });
  add("segments", [=](Case& c) {
    c.q_segments = segments_in_runs(2, q_len, 37);
    c.k_segments = segments_in_runs(2, k_len, 50);
  });
  add("segments_mixed", [=](Case& c) {
    c.q_segments = segments_in_runs(2, q_len, 9);
    c.k_segments = segments_in_runs(2, k_len, 7);
    for (std::vector<int>* ids : {&c.q_segments, &c.k_segments}) {
      for (int& id : *ids) id %= 3;
    }
    c.window.window_right = 0;
  });
  add("spans", [=](Case& c) {
    c.spans = {0, q_len / 3, q_len / 2, k_len + 5, -3, 8, k_len / 2, k_len / 2 + 20};
    c.window.window_right = 0;
  });
  add("packed", [=](Case& c) {
    const int q = q_len / 5, k = k_len / 5;
    c.cu_q = {0, q, q, 3 * q, q_len, 3, q, 2 * q, 2 * q, 4 * q};
    c.cu_k = {0, k, 2 * k, 2 * k, k_len, 0, k, k + 1, 3 * k, 5 * k};
    c.window.window_right = 0;
    c.window.bottom_right = true;
  });
  add("sink_tokens", [=](Case& c) {
    c.window.window_left = k_len / 6, c.window.window_right = 0;
    c.window.sink_tokens = 5;
  });
  // 40 in the kernels for 64, 72 in those for 96, and so on; values narrower still.
  add("odd_dim", [=](Case& c) { c.shape.head_dim = dim - 24, c.shape.value_dim = dim - 32; });
  add("one_query", [](Case& c) { c.shape.q_len = 1; });
  add("one_key", [](Case& c) { c.shape.k_len = 1; });
}

// Every kind of tile of sm90/tiles.h; dense and long ones run where there are rows enough. Of 130 or 100 rows the
// second block of a cluster has two or none. 132 heads and more are items for each multiprocessor of an H200 and
// beyond: blocks take several, drawn from the counter or dealt out. Rows see few keys: the host computes it all too.
inline void add_tiles(const Adder& adder) {
  const auto add = [&](const char* feature, const jfa::Shape& shape, const std::function<void(Case&)>& change) {
    adder(feature, shape, [&](Case& c) {
      c.gradients = false;
      change(c);
    });
  };
  const int d = adder.dim;
  const auto causal = [](Case& c) { c.window.window_right = 0; };
  const auto causal_bottom_right = [](Case& c) {
    c.window.window_right = 0;
    c.window.bottom_right = true;
  };
  const auto none = [](Case&) {};
  add("tile_dense", {1, 130, 140, 132, 2, d, d}, none);
  add("tile_long_dense", {1, 270, 1030, 2, 1, d, d}, none);
  add("tile_short", {1, 270, 333, 2, 1, d, d}, causal);
  add("tile_long", {1, 100, 2101, 170, 2, d, d}, causal);
  add("tile_general", {1, 270, 301, 2, 1, d, d}, [&](Case& c) {
    c.bias = {1, 2, 270, 301};
    c.bias_type = c.type;
    c.mask = {1, 1, 1, 301};
    causal(c);
  });
  add("tile_bias_by_tma", {1, 270, 304, 2, 1, d, d}, [&](Case& c) {
    c.bias = {1, 2, 270, 304};
    c.bias_type = c.type;
    causal(c);
  });
  add("tile_mask_by_tma", {2, 270, 304, 2, 1, d, d}, [&](Case& c) {
    c.mask = {2, 1, 270, 304};
    c.window.window_left = 200, c.window.window_right = 20;
  });
  add("tile_mask_by_tma_dropping", {1, 270, 304, 2, 1, d, d}, [&](Case& c) {
    c.mask = {1, 2, 270, 304};
    c.dropout_steps = 30000;
    causal(c);
  });
  // The last tile of values is cleaned behind what the rows see.
  const auto narrow = [](Case& c) { c.window.window_left = 20, c.window.window_right = 5; };
  add("tile_window", {1, 270, 401, 2, 2, d, d}, narrow);
  add("tile_lengths", {3, 200, 300, 2, 1, d, d}, [](Case& c) {
    c.q_lengths = {200, 0, 77};
    c.k_lengths = {300, 129, 0};
  });
  add("tile_sequences", {1, 300, 2101, 70, 2, d, d}, [&](Case& c) {
    c.cu_q = {0, 100, 300};
    c.cu_k = {0, 50, 2101};
    causal_bottom_right(c);
  });
  const auto sequences = [](Case& c) {
    c.cu_q = {7, 140, 140, 291};
    c.cu_k = {3, 100, 130, 281};
  };
  add("tile_sequences_gaps", {1, 300, 290, 8, 4, d, d}, sequences);
  add("tile_sequences_by_table", {1, 300, 290, 2, 1, d, d}, [](Case& c) {  // so short that they have no tiles
    c.cu_q = {7, 60, 60, 100, 140, 291};
    c.cu_k = {3, 40, 90, 130, 130, 281};
  });
  // In clusters, where there are any: of two heads of a group, and of two query tiles. Rows see few of the keys.
  const auto long_sequences = [&](Case& c) {
    c.cu_q = {7, 270, 291};
    c.cu_k = {3, 130, 4190};
    causal(c);
  };
  add("tile_sequences_pairs", {1, 300, 4200, 16, 4, d, d}, long_sequences);
  add("tile_sequences_clusters", {1, 300, 4200, 15, 5, d, d}, long_sequences);
  add("tile_lengths_long", {3, 130, 2051, 44, 1, d, d}, [](Case& c) {
    c.q_lengths = {130, 100, 3};
    c.k_lengths = {131, 0, 2050};
  });
  add("tile_empty_rows", {1, 300, 90, 2, 1, d, d}, causal_bottom_right);
  add("tile_scores", {1, 270, 301, 2, 1, d, d}, [&](Case& c) {
    c.soft_cap = 2.0f;
    c.alibi_slopes = {0.02f, 0.1f};
    c.sinks = {3.0f, -1.0f};
    c.dropout_steps = 6554;
    causal(c);
  });
  const auto capped = [](Case& c) { c.soft_cap = 2.0f; };
  add("tile_capped_dense", {1, 130, 140, 4, 2, d, d}, capped);
  add("tile_capped", {1, 270, 301, 2, 1, d, d}, [&](Case& c) { capped(c), causal(c); });
  add("tile_capped_sinks", {1, 270, 301, 2, 1, d, d}, [&](Case& c) { capped(c), c.sinks = {3.0f, -1.0f}; });
  add("tile_dropping", {1, 270, 301, 2, 1, d, d}, [&](Case& c) { c.dropout_steps = 30000, causal(c); });
  add("tile_drawn", {2, 20, 150, 70, 10, d, d}, causal);
  add("tile_drawn_dense", {1, 20, 150, 140, 20, d, d}, none);
  add("tile_drawn_general", {2, 20, 150, 70, 10, d, d}, [](Case& c) { c.device_scale = {0.15f, -0.2f}; });
  add("tile_dealt", {1, 1, 4100, 140, 2, d, d}, none);
  if (d == 192) {  // has tiles of its own for values of up to 128
    add("tile_values", {1, 130, 140, 132, 1, d, 120}, none);
    add("tile_values_causal", {1, 270, 401, 2, 1, d, 128}, causal);
    add("tile_values_general", {1, 150, 200, 2, 1, d, 120}, [](Case& c) { c.device_scale = {0.1f}; });
  }
}

// Every kind of tile of sm90/backward*_tiles.h: 200 keys and 150 queries are several tiles of all kernels, and end in
// the middle of one. Rows and keys that must be cleaned; rows and keys that see nothing; and 140 items, as above.
inline void add_gradients(const Adder& add) {
  const int d = add.dim;
  add("grad_dense", {1, 150, 200, 4, 2, d, d}, [](Case&) {});
  add("grad_causal", {1, 200, 150, 2, 2, d, d}, [](Case& c) {
    c.window.window_right = 0;
    c.window.bottom_right = true;
  });
  add("grad_window", {1, 150, 330, 2, 1, d, d}, [](Case& c) { c.window.window_left = 70, c.window.window_right = 3; });
  add("grad_lengths", {3, 150, 200, 2, 1, d, d}, [](Case& c) {
    c.q_lengths = {150, 0, 77};
    c.k_lengths = {200, 129, 0};
    c.window.window_right = 0;
  });
  const auto sequences = [](Case& c) {
    c.cu_q = {7, 140, 140, 291};
    c.cu_k = {3, 100, 130, 281};
  };
  add("grad_sequences", {1, 300, 290, 2, 1, d, d}, sequences);
  add("grad_sequences_causal", {1, 300, 290, 2, 2, d, d}, [&](Case& c) {
    sequences(c);
    c.window.window_right = 0;
    c.window.bottom_right = true;
  });
  add("grad_general", {1, 150, 200, 2, 1, d, d}, [](Case& c) {
    c.bias = {1, 2, 150, 200};
    c.mask = {1, 1, 150, 200};
    c.window.window_right = 0;
  });
  add("grad_scores", {1, 150, 200, 2, 1, d, d}, [](Case& c) {
    c.bias = {1, 2, 150, 200};
    c.soft_cap = 0.7f;
    c.alibi_slopes = {0.02f, 0.1f};
    c.sinks = {1.0f, -1.0f};
    c.dropout_steps = 6554;
    c.window.window_left = 100;
  });
  add("grad_capped", {1, 150, 200, 2, 1, d, d}, [](Case& c) { c.soft_cap = 0.7f, c.window.window_right = 0; });
  add("grad_dropping", {1, 150, 200, 2, 1, d, d}, [](Case& c) { c.dropout_steps = 50000, c.window.window_right = 0; });
  add("grad_bias_by_tma", {1, 150, 200, 4, 2, d, d}, [](Case& c) {
    c.bias = {1, 4, 150, 200};
    c.bias_type = c.type;
    c.soft_cap = 0.7f;
  });
  add("grad_mask_by_tma", {2, 150, 208, 2, 1, d, d == 192 ? 128 : d}, [](Case& c) {
    c.mask = {2, 1, 150, 208};
    c.dropout_steps = 30000;
    c.window.window_right = 0;
  });
  // Tiles of the gradient: several along both axes, some without a step, rows of odd length; and more of them than an
  // H200 has pairs of multiprocessors.
  add("grad_bias", {3, 300, 201, 4, 2, d, d}, [](Case& c) {
    c.bias = {1, 1, 300, 201};
    c.q_lengths = {300, 0, 130};
    c.k_lengths = {201, 201, 77};
    c.window.window_right = 0;
  });
  add("grad_bias_narrow", {2, 20, 150, 70, 35, d, d}, [](Case& c) {
    c.bias = {1, 70, 20, 150};
    c.bias_type = c.type;
  });
  add("grad_drawn", {2, 20, 150, 70, 35, d, d}, [](Case& c) { c.window.window_right = 0; });
  if (d <= 128) add("grad_long", {1, d == 64 ? 4100 : 1030, 200, 1, 1, d, d}, [](Case&) {});
  if (d == 192) {
    add("grad_values", {1, 150, 200, 2, 1, d, 120}, [](Case&) {});
    add("grad_values_general", {1, 150, 200, 2, 1, d, 128}, [](Case& c) { c.device_scale = {0.1f}; });
  }
}

// Every feature in each family, in every compiled head dim, in float16 and bfloat16.
inline std::vector<Case> all_cases(bool small) {
  using jfa::ElementType;
  std::vector<Case> cases;
  for (const int dim : {JFA_HEAD_DIMS}) {
    for (const ElementType type : {ElementType::kBfloat16, ElementType::kHalf}) {
      add_features(Adder(cases, dim, type, "sm80"), small ? 70 : 130, small ? 80 : 150);
      if (!jfa::sm90::kBuilt) continue;
      const Adder hopper(cases, dim, type, "sm90");
      add_features(hopper, small ? 70 : 290, small ? 80 : 310);
      add_tiles(hopper);
      add_gradients(hopper);
    }
  }
  const int dim = cases.front().shape.head_dim;
  Adder(cases, dim, ElementType::kBfloat16, "auto")("plain", {2, 70, 80, 2, 2, dim, dim}, [](Case&) {});
  return cases;
}

}  // namespace sanitizer
