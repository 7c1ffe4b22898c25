// The scan of sequences. They are channels first, so tiles are transposed when they are read and written.
#pragma once

#include "scan_block.h"

namespace {

template <typename T>
class Scan1d {
 public:
  explicit Scan1d(const ScanArgs& args)
      : args(args),
        model{args.channels, 0, args.states, nullptr, args.A, args.D, args.delta_bias},
        length(args.length),
        tiles(divide_up(args.length, TILE)) {}

  ScanStatus forward() {
    const int64_t blocks = model.blocks(), K = args.directions;
    const Groups samples = {args.batch, at_most(args.batch, divide_up(task_count(elements()), blocks * K))};
    const int64_t bytes = Space::bytes(*this);
    const Memory memory(bytes * args.threads);
    if (!memory.base) return SCAN_OUT_OF_MEMORY;
    parallel(samples.count * K * blocks, args.threads, [&](int64_t task, int thread) {
      Arena own = {memory.base + thread * bytes};
      const Space space(own, *this);
      const int64_t block = task % blocks, direction = task / blocks % K, group = task / blocks / K;
      for (int64_t b = samples.first(group); b < samples.first(group + 1); ++b)
        forward_block(space, place(space, b, direction, block));
    });
    return SCAN_OK;
  }

  ScanStatus backward() {
    const int64_t blocks = model.blocks(), K = args.directions, size = model.gradient_size();
    const int64_t BC_size = args.batch * K * args.states * length;  // of B, and of C
    const Split groups = split(task_count(elements()), args.batch, blocks, K, 2 * BC_size, K * blocks * size);
    const int64_t pieces = (groups.samples.count > 1 ? groups.samples.count : 1) * K * blocks, bytes = Space::bytes(*this);
    float *dBC, *dparameters;
    char* spaces;
    const auto lay_out = [&](Arena arena) {
      dBC = arena.take(groups.blocks.count * 2 * BC_size);
      dparameters = arena.take(pieces * size);
      spaces = arena.take<char>(bytes * args.threads);
      return arena.used;
    };
    const Memory memory(lay_out({nullptr}));
    if (!memory.base) return SCAN_OUT_OF_MEMORY;
    lay_out({memory.base});
    clear(dparameters, pieces * size);

    parallel(groups.samples.count * K * groups.blocks.count, args.threads, [&](int64_t task, int thread) {
      Arena own = {spaces + thread * bytes};
      const Space space(own, *this);
      const int64_t block_group = task % groups.blocks.count, direction = task / groups.blocks.count % K;
      const int64_t sample_group = task / groups.blocks.count / K;
      float* const dB = dBC + block_group * 2 * BC_size;
      for (int64_t b = groups.samples.first(sample_group); b < groups.samples.first(sample_group + 1); ++b) {
        const int64_t at = (b * K + direction) * args.states * length;
        clear(dB + at, args.states * length);
        clear(dB + BC_size + at, args.states * length);
        for (int64_t block = groups.blocks.first(block_group); block < groups.blocks.first(block_group + 1); ++block) {
          float* const piece = dparameters + ((sample_group * blocks + block) * K + direction) * size;
          backward_block(space, place(space, b, direction, block), dB + at, dB + BC_size + at, piece);
        }
      }
    });

    const int64_t chunk = 16384, chunks = divide_up(BC_size, chunk);
    parallel(2 * chunks, args.threads, [&](int64_t task, int) {
      const int64_t begin = task % chunks * chunk, count = at_most(BC_size - begin, chunk);
      const float* const from = dBC + (task < chunks ? 0 : BC_size) + begin;
      add_groups(from, groups.blocks.count, 2 * BC_size, count, (T*)(task < chunks ? args.dB : args.dC) + begin);
    });
    finish_gradients(model, dparameters, groups.samples.count, K, args.threads, nullptr, args.dA, args.dD, args.ddelta_bias);
    return SCAN_OK;
  }

 private:
  int64_t elements() const { return args.batch * args.directions * args.channels * args.length; }

  // Working memory of a thread.
  struct Space {
    Parameters parameters;
    float *u, *y, *gy, *du;  // [TILE, BLOCK]
    float *state, *carry;    // [N, BLOCK]
    float* skip;             // [BLOCK]: D
    float *proj, *dproj;     // [TILE, 2N], with padding
    Tile* tile;
    Work* work;

    static int64_t bytes(const Scan1d& scan) {
      Arena arena = {nullptr};
      Space(arena, scan);
      return arena.used;
    }

    Space(Arena& arena, const Scan1d& scan) {
      const int64_t states = scan.args.states;
      parameters = take_parameters(arena, scan.model, true);
      for (float** each : {&u, &y, &gy, &du}) *each = arena.take(TILE * BLOCK);
      for (float** each : {&state, &carry}) *each = arena.take(states * BLOCK);
      skip = arena.take(BLOCK);
      for (float** each : {&proj, &dproj}) *each = arena.take(TILE * 2 * states);
      tile = arena.take<Tile>(1);
      work = arena.take<Work>(1);
    }
  };

  // Where a block of channels of one sequence lies in memory.
  struct Place {
    int64_t count;    // number of channels
    int64_t channel;  // row in u, delta, y (rows of L elements)
    int64_t state;    // row in B, C (rows of L elements)
    int64_t saved;    // offset in `saved`
  };

  // Also packs the parameters of the block and clears what its missing channels would read.
  Place place(const Space& space, int64_t b, int64_t direction, int64_t block) const {
    const int64_t sequence = b * args.directions + direction, channel = block * BLOCK;
    const int64_t count = at_most(args.channels - channel, BLOCK), first = direction * args.channels + channel;
    pack(model, first, count, space.parameters);
    clear(space.skip, BLOCK);
    for (int64_t c = 0; args.D && c < count; ++c) space.skip[c] = args.D[first + c];
    for (float* each : {space.u, space.gy, (float*)space.work->delta}) memset(each, 0, sizeof(Rows));
    return {count, sequence * args.channels + channel, sequence * args.states,
            sequence * tiles * args.states * args.channels + channel};
  }

  // Transposes a tile of u, delta, B and C, and applies bias and softplus to delta.
  void load_tile(const Space& space, const Place& at, int64_t start, bool slope) const {
    Tile& tile = *space.tile;
    Work& work = *space.work;
    const int64_t states = args.states, count = at_most(length - start, TILE);
    tile.count = (int)count;
    for (int t = 0; t < TILE; ++t) {
      tile.at[t] = t * BLOCK;
      tile.proj[t] = space.proj + t * 2 * states;
      tile.dproj[t] = space.dproj + t * 2 * states;
    }
    const int64_t row = at.channel * length + start, state_row = at.state * length + start;
    transpose((const T*)args.u + row, length, at.count, count, space.u, BLOCK, LN2);
    transpose((const T*)args.delta + row, length, at.count, count, (float*)work.delta, BLOCK, LOG2E);
    transpose((const T*)args.B + state_row, length, states, count, space.proj, 2 * states, 1.f);
    transpose((const T*)args.C + state_row, length, states, count, space.proj + states, 2 * states, 1.f);
    for (int t = 0; t < tile.count; ++t)
      for (int v = 0; v < BLOCK; v += LANES)
        store(work.delta[t] + v, load(work.delta[t] + v) + load(space.parameters.bias + v));
    if (args.softplus)
      slope ? softplus<true>(tile.count, work) : softplus<false>(tile.count, work);
    else
      for (int v = 0; v < TILE * BLOCK; v += LANES) store(&work.slope[0][0] + v, broadcast(1.f));
  }

  void forward_block(const Space& space, const Place& at) const {
    Work& work = *space.work;
    clear(space.state, args.states * BLOCK);
    for (int64_t start = 0, saved = at.saved; start < length; start += TILE) {
      load_tile(space, at, start, false);
      for (int64_t n = 0; n < args.states; ++n, saved += args.channels)
        for (int64_t c = 0; c < BLOCK; c += LANES)
          store_some(args.saved + saved + c, load(space.state + n * BLOCK + c), at.count - c);
      for (int64_t t = 0; t < space.tile->count; ++t)
        for (int v = 0; v < BLOCK; v += LANES)
          store(space.y + t * BLOCK + v, load(space.u + t * BLOCK + v) * load(space.skip + v) * LOG2E);
      scan_forward(*space.tile, space.parameters, 0, args.states, space.u, space.y, space.state, work);
      transpose(space.y, BLOCK, space.tile->count, at.count, args.y + at.channel * length + start, length, 1.f);
    }
  }

  void backward_block(const Space& space, const Place& at, float* dB, float* dC, float* piece) const {
    const Gradients grad = gradients(model, piece);
    const int64_t states = args.states;
    Work& work = *space.work;
    clear(space.carry, states * BLOCK);
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      const int64_t start = tile * TILE, row = at.channel * length + start;
      load_tile(space, at, start, true);
      const int64_t count = space.tile->count;
      for (int64_t n = 0; n < states; ++n)
        for (int64_t c = 0; c < BLOCK; c += LANES)
          store(space.state + n * BLOCK + c,
                load_some(args.saved + at.saved + (tile * states + n) * args.channels + c, at.count - c));
      transpose(args.gy + row, length, at.count, count, space.gy, BLOCK, 1.f);
      transpose(dB + start, length, states, count, space.dproj, 2 * states, 1.f);
      transpose(dC + start, length, states, count, space.dproj + states, 2 * states, 1.f);
      memset(space.du, 0, sizeof(Rows));
      scan_backward(*space.tile, space.parameters, 0, states, space.u, space.gy, space.du, space.state, space.carry, grad,
                    work);
      finish_tile(space, gradient_of_D(model, piece));
      transpose(space.du, BLOCK, count, at.count, (T*)args.du + row, length, 1.f);
      transpose((float*)work.ddelta, BLOCK, count, at.count, (T*)args.ddelta + row, length, LOG2E);
      transpose(space.dproj, 2 * states, count, states, dB + start, length, 1.f);
      transpose(space.dproj + states, 2 * states, count, states, dC + start, length, 1.f);
    }
  }

  // Adds the contributions of D to du and the gradient of D, after the scan_backward of a tile.
  void finish_tile(const Space& space, float* dD) const {
    const int count = space.tile->count;
    for (int v = 0; v < BLOCK; v += LANES) {
      Vec sum = load(dD + v);
      for (int at = v; at < count * BLOCK; at += BLOCK) {
        const Vec g = load(space.gy + at);
        sum += load(space.u + at) * g;
        store(space.du + at, load(space.du + at) * LN2 + load(space.skip + v) * g);
      }
      store(dD + v, sum);
    }
  }

  const ScanArgs& args;
  const Model model;
  const int64_t length, tiles;
};

}  // namespace
