// What lies where in the memory that the ranks of a group share. It begins as zeros.
//
//   members    [rank]                    what each rank says to all
//   pipes      [channel][from][to]       a Pipe and a PipeEntry for each slot that it may hold
//   outboxes   [rank][2]                 an Outbox and its bytes
//   slots      [rank][num_slots]         pieces of messages that the rank has sent
#pragma once

#include <cstdint>

#include "waiting.h"

namespace muster {

constexpr int64_t kChannels = 3, kMaxRanks = 64;

struct GroupShape {
  int64_t size;          // ranks
  int64_t num_slots;     // of each rank, more than it has pipes
  int64_t outbox_bytes;  // a multiple of kLine for each rank
  int64_t slot_bytes;    // a multiple of kLine
};

struct alignas(kLine) Member {
  std::atomic<int32_t> process;  // its id; 0 until the rank has joined
  std::atomic<int32_t> is_closed;
  alignas(kLine) std::atomic<uint64_t> round;  // of the collectives' rounds, the last whose outbox it has filled
  Bell bell;
};

// What a rank gives in one round. A rank that fills the outbox of round r has finished round r - 1, for which it has seen
// all others fill theirs, and so finish r - 2: nobody reads the outbox of r - 2 any more, which is this one.
struct alignas(kLine) Outbox {
  int64_t lengths[kMaxRanks];  // bytes for each rank
  int64_t has_more;            // whether another round follows for somebody
};

// Messages of one kind from one rank to another, in pieces. The pieces in (received, sent] lie in slots.
struct Pipe {
  alignas(kLine) std::atomic<uint64_t> sent;
  alignas(kLine) std::atomic<uint64_t> received;
};

struct PipeEntry {
  int64_t slot;           // of the sender's
  int64_t message_bytes;  // of the whole message
};

class GroupMemory {
 public:
  GroupMemory(void* memory, const GroupShape& shape) : base_(static_cast<char*>(memory)), shape_(shape) {}

  const GroupShape& shape() const { return shape_; }
  Member& member(int64_t rank) const { return reinterpret_cast<Member*>(base_)[rank]; }
  Pipe& pipe(int64_t channel, int64_t from, int64_t to) const {
    return *reinterpret_cast<Pipe*>(base_ + pipes_at() + ((channel * shape_.size + from) * shape_.size + to) * pipe_bytes());
  }
  PipeEntry& entry(Pipe& pipe, uint64_t piece) const {
    return reinterpret_cast<PipeEntry*>(&pipe + 1)[piece % static_cast<uint64_t>(shape_.num_slots)];
  }
  Outbox& outbox(int64_t rank, uint64_t round) const {
    return *reinterpret_cast<Outbox*>(base_ + outboxes_at() + (rank * 2 + static_cast<int64_t>(round & 1)) * outbox_stride());
  }
  static char* data(Outbox& outbox) { return reinterpret_cast<char*>(&outbox + 1); }
  char* slot(int64_t rank, int64_t slot) const {
    return base_ + slots_at() + (rank * shape_.num_slots + slot) * shape_.slot_bytes;
  }
  int64_t num_bytes() const { return slots_at() + shape_.size * shape_.num_slots * shape_.slot_bytes; }

 private:
  int64_t pipe_bytes() const {
    const int64_t entries = shape_.num_slots * static_cast<int64_t>(sizeof(PipeEntry));
    return static_cast<int64_t>(sizeof(Pipe)) + (entries + kLine - 1) / kLine * kLine;
  }
  int64_t outbox_stride() const { return static_cast<int64_t>(sizeof(Outbox)) + shape_.outbox_bytes; }
  int64_t pipes_at() const { return shape_.size * static_cast<int64_t>(sizeof(Member)); }
  int64_t outboxes_at() const { return pipes_at() + kChannels * shape_.size * shape_.size * pipe_bytes(); }
  int64_t slots_at() const { return outboxes_at() + shape_.size * 2 * outbox_stride(); }

  char* base_;
  GroupShape shape_;
};

}  // namespace muster
