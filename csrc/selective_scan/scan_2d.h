// The 2D scan of images, channels last, in four directions. Nothing is copied in another order: a task keeps its block of
// channels of one image in the second-level cache and walks over it four times.
#pragma once

#include "scan_block.h"

namespace {

// Position in the image of each step of a direction: row by row, column by column, and both reversed.
struct Walk {
  int direction;
  int64_t length;
  const int32_t* by_columns;

  int64_t operator()(int64_t step) const {
    if (direction & 2) step = length - 1 - step;
    return direction & 1 ? by_columns[step] : step;
  }
};

template <typename T>
class Scan2d {
 public:
  explicit Scan2d(const Scan2dArgs& args)
      : args(args),
        model{args.channels, args.rank, args.states, args.dt_weight, args.A, args.D, args.dt_bias},
        length(args.height * args.width),
        tiles(divide_up(length, TILE)),
        width(args.rank + 2 * args.states) {}

  ScanStatus forward() {
    const int64_t blocks = model.blocks();
    const Groups samples = {args.batch, at_most(args.batch, divide_up(task_count(elements()), blocks))};
    const int64_t bytes = Space::bytes(*this, false);
    char* spaces;
    const auto lay_out = [&](Arena arena) {
      by_columns = arena.take<int32_t>(length);
      spaces = arena.take<char>(bytes * args.threads);
      return arena.used;
    };
    const Memory memory(lay_out({nullptr}));
    if (!memory.base) return SCAN_OUT_OF_MEMORY;
    lay_out({memory.base});
    fill_columns();

    parallel(samples.count * blocks, args.threads, [&](int64_t task, int thread) {
      Arena own = {spaces + thread * bytes};
      const Space space(own, *this, false);
      const int64_t group = task / blocks, channel = task % blocks * BLOCK;
      pack_block(space, channel);
      for (int64_t b = samples.first(group); b < samples.first(group + 1); ++b) forward_block(space, b, channel);
    });
    return SCAN_OK;
  }

  ScanStatus backward() {
    const int64_t blocks = model.blocks(), size = 4 * model.gradient_size();
    const int64_t sample_stride = round_up(length * 4 * width + LANES, 16);  // Tile: zeros may be added after the end
    const Split groups = split(task_count(elements()), args.batch, blocks, args.batch * sample_stride, blocks * size);
    const int64_t group_stride = args.batch * sample_stride;
    const int64_t pieces = (groups.samples.count > 1 ? groups.samples.count : 1) * blocks;
    const int64_t chunk = divide_up(4096, width), chunk_bytes = round_up((chunk * width + LANES) * sizeof(float), 64);
    const int64_t bytes = at_least(Space::bytes(*this, true), chunk_bytes);
    float *dproj, *dparameters;
    char* spaces;
    const auto lay_out = [&](Arena arena) {
      by_columns = arena.take<int32_t>(length);
      dproj = arena.take(groups.blocks.count * group_stride);
      dparameters = arena.take(pieces * size);
      spaces = arena.take<char>(bytes * args.threads);
      return arena.used;
    };
    const Memory memory(lay_out({nullptr}));
    if (!memory.base) return SCAN_OUT_OF_MEMORY;
    lay_out({memory.base});
    fill_columns();
    if (args.batch == 0) clear(dparameters, pieces * size);

    parallel(groups.samples.count * groups.blocks.count, args.threads, [&](int64_t task, int thread) {
      Arena own = {spaces + thread * bytes};
      const Space space(own, *this, true);
      const int64_t sample_group = task / groups.blocks.count, block_group = task % groups.blocks.count;
      const int64_t first = groups.samples.first(sample_group), last = groups.samples.first(sample_group + 1);
      float* const own_dproj = dproj + block_group * group_stride;
      for (int64_t block = groups.blocks.first(block_group); block < groups.blocks.first(block_group + 1); ++block) {
        float* const piece = dparameters + (sample_group * blocks + block) * size;
        clear(piece, size);
        pack_block(space, block * BLOCK);
        const bool clears = block == groups.blocks.first(block_group);
        for (int64_t b = first; b < last; ++b)
          backward_block(space, b, block * BLOCK, clears, own_dproj + b * sample_stride, piece);
      }
    });

    const int64_t chunks = divide_up(length, chunk);
    parallel(args.batch * chunks, args.threads, [&](int64_t task, int thread) {
      const int64_t b = task / chunks, begin = task % chunks * chunk, count = at_most(length - begin, chunk);
      float* const sum = (float*)(spaces + thread * bytes);
      for (int direction = 0; direction < 4; ++direction) {
        const float* const from = dproj + b * sample_stride + (direction * length + begin) * width;
        add_groups(from, groups.blocks.count, group_stride, count * width, sum);
        T* to = (T*)args.dproj + ((b * length + begin) * 4 + direction) * width;
        for (const float* row = sum; row < sum + count * width; row += width, to += 4 * width)
          for (int64_t i = 0; i < width; i += LANES) store_some(to + i, load(row + i), width - i);
      }
    });
    finish_gradients(model, dparameters, groups.samples.count, args.threads, args.ddt_weight, args.dA, args.dD, args.ddt_bias);
    return SCAN_OK;
  }

 private:
  int64_t elements() const { return args.batch * 4 * args.channels * length; }

  // Working memory of a thread.
  struct Space {
    Parameters parameters[4];
    float *u, *y, *gy, *du;  // [L, BLOCK]
    float *state, *carry;    // [N, BLOCK]
    float* skip;             // [BLOCK]: D, summed over the directions
    float *proj;             // [TILE, R + 2N rounded up to LANES]
    Tile* tile;
    Work* work;

    static int64_t bytes(const Scan2d& scan, bool backward) {
      Arena arena = {nullptr};
      Space(arena, scan, backward);
      return arena.used;
    }

    Space(Arena& arena, const Scan2d& scan, bool backward) {
      for (Parameters& each : parameters) each = take_parameters(arena, scan.model, backward);
      u = arena.take(scan.length * BLOCK);
      y = arena.take(backward ? 0 : scan.length * BLOCK);
      gy = arena.take(backward ? scan.length * BLOCK : 0);
      du = arena.take(backward ? scan.length * BLOCK : 0);
      state = arena.take(scan.args.states * BLOCK);
      carry = arena.take(scan.args.states * BLOCK);
      skip = arena.take(BLOCK);
      proj = arena.take(TILE * round_up(scan.width, LANES));
      tile = arena.take<Tile>(1);
      work = arena.take<Work>(1);
    }
  };

  void fill_columns() {
    int32_t* to = by_columns;
    for (int64_t column = 0; column < args.width; ++column)
      for (int64_t row = 0; row < args.height; ++row) *to++ = (int32_t)(row * args.width + column);
  }

  int64_t channels_from(int64_t channel) const { return at_most(args.channels - channel, BLOCK); }

  float* saved(int64_t b, int direction, int64_t tile, int64_t n, int64_t channel) const {
    return args.saved + (((b * 4 + direction) * tiles + tile) * args.states + n) * args.channels + channel;
  }

  void pack_block(const Space& space, int64_t channel) const {
    const int64_t count = channels_from(channel);
    clear(space.skip, BLOCK);
    for (int direction = 0; direction < 4; ++direction) {
      pack(model, direction * args.channels + channel, count, space.parameters[direction]);
      for (int64_t c = 0; args.D && c < count; ++c) space.skip[c] += args.D[direction * args.channels + channel + c];
    }
  }

  // Finds the positions of the tile and converts rows of proj in half precision. Unlike proj [L, 4, R + 2N], dproj is
  // [4, L, R + 2N] until the end, so that the part of a direction stays in the second-level cache.
  void fill_tile(const Space& space, int64_t b, int direction, int64_t start, float* dproj) const {
    const Walk position = {direction, length, by_columns};
    Tile& tile = *space.tile;
    tile.count = (int)at_most(length - start, TILE);
    for (int t = 0; t < tile.count; ++t) {
      const int64_t at = position(start + t), row = (at * 4 + direction) * width;
      tile.at[t] = at * BLOCK;
      tile.proj[t] = proj_row((const T*)args.proj + b * length * 4 * width + row, space.proj + t * round_up(width, LANES));
      tile.dproj[t] = dproj + (direction * length + at) * width;
    }
    for (int t = tile.count; t % ROWS; ++t) tile.proj[t] = tile.proj[tile.count - 1];
  }

  const float* proj_row(const float* row, float*) const { return row; }

  template <typename Half>
  const float* proj_row(const Half* row, float* to) const {
    for (int64_t i = 0; i < width; i += LANES) store(to + i, load_some(row + i, width - i));
    return to;
  }

  // While a row is copied, the row this far ahead is prefetched: rows are too far apart for the hardware's prefetcher. Past
  // the end of the matrix a prefetch has no effect.
  static constexpr int64_t AHEAD = 24;

  // Loads `count` channels of a matrix [L, D], scaled. The other lanes of the block become zeros.
  template <typename From>
  void load_block(const From* from, int64_t count, float scale, float* to) const {
    for (int64_t i = 0; i < length; ++i, from += args.channels, to += BLOCK) {
      __builtin_prefetch(from + AHEAD * args.channels);
      for (int v = 0; v < BLOCK; v += LANES) store(to + v, load_some(from + v, count - v) * scale);
    }
  }

  // to = scale * main + skip_scale * skip * other
  template <typename To>
  void store_block(const float* main, float scale, const float* skip, float skip_scale, const float* other, int64_t count,
                   To* to) const {
    for (int64_t i = 0; i < length; ++i, main += BLOCK, other += BLOCK, to += args.channels) {
      __builtin_prefetch(to + AHEAD * args.channels, 1);
      for (int v = 0; v < BLOCK; v += LANES)
        store_some(to + v, load(main + v) * scale + load(skip + v) * skip_scale * load(other + v), count - v);
    }
  }

  void forward_block(const Space& space, int64_t b, int64_t channel) const {
    const int64_t count = channels_from(channel), block = b * length * args.channels + channel;
    load_block((const T*)args.x + block, count, LN2, space.u);
    clear(space.y, length * BLOCK);
    for (int direction = 0; direction < 4; ++direction) {
      const Parameters& p = space.parameters[direction];
      clear(space.state, args.states * BLOCK);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t n = 0; n < args.states; ++n)
          for (int64_t c = 0; c < BLOCK; c += LANES)
            store_some(saved(b, direction, tile, n, channel + c), load(space.state + n * BLOCK + c), count - c);
        fill_tile(space, b, direction, tile * TILE, nullptr);
        project(*space.tile, p, args.rank, *space.work);
        softplus<false>(space.tile->count, *space.work);
        scan_forward(*space.tile, p, args.rank, args.states, space.u, space.y, space.state, *space.work);
      }
    }
    store_block(space.y, 1.f, space.skip, LOG2E, space.u, count, args.y + block);
  }

  // Adds to `dproj` of the sample, or clears it first if `clears`, and to `piece`, the gradients of the block's parameters in
  // four directions.
  void backward_block(const Space& space, int64_t b, int64_t channel, bool clears, float* dproj, float* piece) const {
    const int64_t count = channels_from(channel), block = b * length * args.channels + channel;
    load_block((const T*)args.x + block, count, LN2, space.u);
    load_block(args.gy + block, count, 1.f, space.gy);
    clear(space.du, length * BLOCK);
    for (int direction = 0; direction < 4; ++direction) {
      const Parameters& p = space.parameters[direction];
      const Gradients grad = gradients(model, piece + direction * model.gradient_size());
      clear(space.carry, args.states * BLOCK);
      if (clears) clear(dproj + direction * length * width, length * width);
      for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        for (int64_t n = 0; n < args.states; ++n)
          for (int64_t c = 0; c < BLOCK; c += LANES)
            store(space.state + n * BLOCK + c, load_some(saved(b, direction, tile, n, channel + c), count - c));
        fill_tile(space, b, direction, tile * TILE, dproj);
        project(*space.tile, p, args.rank, *space.work);
        softplus<true>(space.tile->count, *space.work);
        scan_backward(*space.tile, p, args.rank, args.states, space.u, space.gy, space.du, space.state, space.carry, grad,
                      *space.work);
        project_backward(*space.tile, p, args.rank, *space.work, grad);
      }
    }
    add_gradient_of_D(space, piece);
    store_block(space.du, LN2, space.skip, 1.f, space.gy, count, (T*)args.dx + block);
  }

  // The sum over positions of u * gy, the same for every direction.
  void add_gradient_of_D(const Space& space, float* piece) const {
    for (int v = 0; v < VECS; ++v) {
      Vec sum = {};
      for (int64_t at = v * LANES; at < length * BLOCK; at += BLOCK) sum += load(space.u + at) * load(space.gy + at);
      for (int direction = 0; direction < 4; ++direction) {
        float* const to = gradient_of_D(model, piece + direction * model.gradient_size()) + v * LANES;
        store(to, load(to) + sum);
      }
    }
  }

  const Scan2dArgs& args;
  const Model model;
  const int64_t length, tiles, width;  // width: R + 2N, columns of proj in one direction
  int32_t* by_columns;                 // positions, column by column
};

}  // namespace
