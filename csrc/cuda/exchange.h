// Exchanges: how the blocks of a group hand over the operand of their next product. A template parameter of
// the persistent kernels.
//
// The operand lies as [k_steps][rows][32 bytes]; slice i owns k_steps / slices of the steps, which hold, for
// each of the P values published per unit, the U units: K counts (slice, p, unit). Epoch e is the e-th
// operand.
//
//   stage(e, i, p, value)   this thread's element i has this value
//   publish(e)              all threads of the block have staged: the group may have the block's slice
//   receive(e)              returns once the steps of K that this warp multiplies have come
//   received(e)             where it is; load(from) reads 8 bytes of it
#pragma once

#include "../plan.h"
#include "operand.h"
#include "primitives/flag.h"
#include "primitives/mbarrier.h"

namespace fusedrnn::cuda {

// What an exchange knows of its block. A thread's elements are one unit, `unit` of the block's U, for the
// sequences row0, row0 + row_stride, ... of the group's rows.
struct Place {
  int rows, units, slices, slice;
  int unit, row0, row_stride;
  int first_k, end_k;  // the steps of K that this warp multiplies
  int k_steps;         // all of them

  FUSEDRNN_DEVICE bool has(int i) const { return row(i) < rows; }
  FUSEDRNN_DEVICE int row(int i) const { return row0 + i * row_stride; }
};

// Byte offset in the operand of a value published by this block.
template <class E>
FUSEDRNN_DEVICE int operand_offset(const Place& at, int published, int p, int unit, int row) {
  const int byte = ((at.slice * published + p) * at.units + unit) * static_cast<int>(sizeof(E));
  return (byte / 32 * at.rows + row) * 32 + byte % 32;
}

// A group of one block. One buffer is enough: all threads are past their products when any of them stages.
template <class E, int kPublished>
class BlockExchange {
 public:
  static constexpr Exchange kKind = Exchange::kBlock;

  FUSEDRNN_DEVICE BlockExchange(const Place& at, const SharedLayout& layout, char* shared, char*, uint32_t*,
                                Deadline&)
      : at_(at), operand_(shared + layout.operand) {}

  FUSEDRNN_DEVICE void stage(uint32_t, int i, int p, E value) {
    *reinterpret_cast<E*>(operand_ + operand_offset<E>(at_, kPublished, p, at_.unit, at_.row(i))) = value;
  }
  FUSEDRNN_DEVICE void publish(uint32_t) { sync_block(); }
  FUSEDRNN_DEVICE void receive(uint32_t) {}
  FUSEDRNN_DEVICE const char* received(uint32_t) const { return operand_; }
  FUSEDRNN_DEVICE static Vector8 load(const char* from) { return *reinterpret_cast<const Vector8*>(from); }
  FUSEDRNN_DEVICE void leave() {}

 private:
  const Place& at_;
  char* operand_;
};

// A group that is a cluster: every block stores its slice into the shared memory of every block, and the
// stores complete on the receiver's mbarrier.
//
// Two buffers are enough, with no further barrier. A block stores epoch e + 2 after it has received all of e
// + 1, and a peer publishes its part of e + 1 after its own products of e: then no one reads buffer e any
// more.
template <class E, int kPublished>
class ClusterExchange {
 public:
  static constexpr Exchange kKind = Exchange::kCluster;
  // Packets of 16 bytes: neighbouring units of one sequence, since their number divides 16. Lanes take
  // packets first and blocks second, so that a lane keeps its packet where it can.
  static constexpr int kUnits = 16 / sizeof(E), kPackets = 32 / kUnits;

  FUSEDRNN_DEVICE ClusterExchange(const Place& at, const SharedLayout& layout, char* shared, char*, uint32_t*,
                                  Deadline& deadline)
      : at_(at),
        operand_(shared + layout.operand),
        staging_(reinterpret_cast<E*>(shared + layout.staging)),
        operand_bytes_(static_cast<int>(layout.operand_bytes)),
        barriers_(reinterpret_cast<Mbarrier*>(shared)),
        deadline_(deadline),
        packet_row_(packet_thread() / at.units),
        packet_offset_(
            opaque(operand_offset<E>(at, kPublished, 0, packet_thread() % at.units, packet_row_))) {
    if (thread_index() == 0) {
      mbarrier_init(&barriers_[0], 1);
      mbarrier_init(&barriers_[1], 1);
      fence_mbarrier_init();
    }
    sync_cluster();
  }

  // [elements][P][threads]: a warp reads only what it wrote.
  FUSEDRNN_DEVICE void stage(uint32_t, int i, int p, E value) {
    staging_[(i * kPublished + p) * threads_of_block() + thread_index()] = value;
  }

  FUSEDRNN_DEVICE void publish(uint32_t epoch) {
    Mbarrier* barrier = &barriers_[epoch & 1];
    char* operand = operand_ + (epoch & 1) * operand_bytes_;
    if (thread_index() == 0 && !deadline_.expired()) mbarrier_expect(barrier, operand_bytes_);
    sync_warp();
    if (deadline_.expired()) return;  // which may not yet be so for other lanes
    const int of_value = at_.units * at_.rows * static_cast<int>(sizeof(E));  // all of a value's steps of K
    for (int i = 0, row = packet_row_; row < at_.rows; ++i, row += at_.row_stride) {
      Vector16 packets[kPublished];  // all are read before the first is sent, which takes longer
#pragma unroll
      for (int p = 0; p < kPublished; ++p)
        packets[p] = *reinterpret_cast<const Vector16*>(
            &staging_[(i * kPublished + p) * threads_of_block() + packet_thread()]);
#pragma unroll
      for (int p = 0; p < kPublished; ++p) {
        char* target = operand + packet_offset_ + (row - packet_row_) * 32 + p * of_value;
        for (int rank = lane_index() / kPackets; rank < at_.slices; rank += kUnits)
          remote_store(target, rank, packets[p], barrier);
      }
    }
  }

  FUSEDRNN_DEVICE void receive(uint32_t epoch) {
    mbarrier_wait(&barriers_[epoch & 1], epoch >> 1 & 1, deadline_);
  }
  FUSEDRNN_DEVICE const char* received(uint32_t epoch) const {
    return operand_ + (epoch & 1) * operand_bytes_;
  }
  FUSEDRNN_DEVICE static Vector8 load(const char* from) { return *reinterpret_cast<const Vector8*>(from); }
  // A block whose patience ended has not received all that its peers may still store into it.
  FUSEDRNN_DEVICE void leave() {
    meet_cluster();
    if (deadline_.expired()) outlast_remote_stores();
  }

 private:
  // The thread that has the first element of this lane's packet. Not kept: the registers hold weights.
  FUSEDRNN_DEVICE static int packet_thread() {
    const int thread = opaque(thread_index());
    return thread / 32 * 32 + thread % kPackets * kUnits;
  }

  const Place& at_;
  char* operand_;
  E* staging_;
  int operand_bytes_;
  Mbarrier* barriers_;
  Deadline& deadline_;
  int packet_row_, packet_offset_;  // of the first element of this lane's packet
};

// A group spread over the grid: slices go through global memory, each with a flag that holds its epoch. A
// warp waits for the slices that its part of K lies in and no others. Two buffers are enough for the reason
// above.
template <class E, int kPublished>
class GridExchange {
 public:
  static constexpr Exchange kKind = Exchange::kGrid;

  FUSEDRNN_DEVICE GridExchange(const Place& at, const SharedLayout& layout, char*, char* operand,
                               uint32_t* flags, Deadline& deadline)
      : at_(at),
        operand_(opaque(operand)),  // else it is computed again for every load
        operand_bytes_(static_cast<int>(layout.operand_bytes)),
        flags_(flags),
        deadline_(deadline) {
    const int steps_of_slice = at.k_steps / at.slices;
    first_last_ = opaque(at.first_k / steps_of_slice << 16 | (at.end_k - 1) / steps_of_slice);
  }

  FUSEDRNN_DEVICE void stage(uint32_t epoch, int i, int p, E value) {
    *reinterpret_cast<E*>(buffer(epoch) + operand_offset<E>(at_, kPublished, p, at_.unit, at_.row(i))) =
        value;
  }
  FUSEDRNN_DEVICE void publish(uint32_t epoch) {
    sync_block();
    if (thread_index() == 0) flag_set(&flags_[at_.slice], epoch + 1);
  }
  FUSEDRNN_DEVICE void receive(uint32_t epoch) {
    const int last = first_last_ & 0xffff;
    for (int slice = (first_last_ >> 16) + lane_index(); slice <= last; slice += 32)
      flag_wait(&flags_[slice], epoch + 1, deadline_);
    sync_warp();
  }
  FUSEDRNN_DEVICE const char* received(uint32_t epoch) const { return buffer(epoch); }
  FUSEDRNN_DEVICE static Vector8 load(const char* from) { return load_fresh(from); }
  FUSEDRNN_DEVICE void leave() {}

 private:
  FUSEDRNN_DEVICE char* buffer(uint32_t epoch) const { return operand_ + (epoch & 1) * operand_bytes_; }

  const Place& at_;
  char* operand_;
  int operand_bytes_;
  uint32_t* flags_;
  Deadline& deadline_;
  int first_last_;  // slices that this warp multiplies, in 16 bits each: divisions do not precede a flag
};

}  // namespace fusedrnn::cuda
