// Messages from one rank to another, in pieces that lie in the sender's slots until they are received.
//
// A sender waits for nobody: what finds no slot stays where it lies and is moved later, by a thread that is there from
// the first such message on, or by whoever waits meanwhile.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "peers.h"

namespace muster {

class Messages {
 public:
  explicit Messages(Peers& peers) : peers_(peers), slots_(peers.memory().shape().num_slots) {
    const int64_t size = peers.size();
    ways_.resize(kChannels * size);
    for (int64_t way = 0; way < kChannels * size; ++way) {
      ways_[way].to = way % size;
      ways_[way].pipe = &peers.memory().pipe(way / size, peers.index(), way % size);
    }
  }

  ~Messages() { stop(); }

  Messages(const Messages&) = delete;
  Messages& operator=(const Messages&) = delete;

  // Sends `bytes` at `from`, which stay as they are until `is_moved` is not 0. After `stop` nothing is read any more.
  int64_t send(const char* from, int64_t bytes, int64_t to, int64_t channel, std::atomic<int32_t>* is_moved) {
    if (peers_.has_left(to)) return ended(kLost, to);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_stopped_) return ended(kClosed, peers_.index());
    Way& way = ways_[channel * peers_.size() + to];
    way.kept.push_back({from, bytes, 0, is_moved});
    num_kept_.fetch_add(1);
    while (!way.kept.empty() && move_piece(way)) continue;
    if (!way.kept.empty()) {
      if (!mover_.joinable()) mover_ = std::thread([this] { keep_moving(); });
      has_kept_.notify_one();
    }
    return kDone;
  }

  // Waits until a message to `to` has been moved.
  int64_t await_moved(const std::atomic<int32_t>& is_moved, int64_t to) {
    return peers_.wait([&] { return is_moved.load() != 0; }, [=](int64_t rank) { return rank == to; }, [this] { help(); });
  }

  int64_t receive(char* out, int64_t bytes, int64_t from, int64_t channel) {
    const GroupMemory& memory = peers_.memory();
    Pipe& pipe = memory.pipe(channel, from, peers_.index());
    for (int64_t at = 0; at < bytes; at += memory.shape().slot_bytes) {
      const uint64_t piece = pipe.received.load(std::memory_order_relaxed);
      const auto is_there = [&] { return pipe.sent.load() > piece; };
      const int64_t end = peers_.wait(is_there, [=](int64_t rank) { return rank == from; }, [this] { help(); });
      if (end != kDone) return end;
      const PipeEntry entry = memory.entry(pipe, piece);
      if (entry.message_bytes != bytes) return ended(kUnequal, from);
      std::memcpy(out + at, memory.slot(from, entry.slot), std::min(memory.shape().slot_bytes, bytes - at));
      pipe.received.store(piece + 1);
      peers_.ring(from);
    }
    return kDone;
  }

  // Moves what can be moved, unless another thread is about it.
  void help() {
    if (num_kept_.load(std::memory_order_relaxed) == 0) return;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock() && !is_stopped_) move_pieces();
  }

  // Gives up what has not been moved; idempotent.
  void stop() {
    const std::lock_guard<std::mutex> stopping(stopping_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_stopped_ = true;
      has_kept_.notify_one();
    }
    peers_.own().bell.ring();
    if (mover_.joinable()) mover_.join();
  }

 private:
  struct Kept {
    const char* from;
    int64_t bytes;
    int64_t moved;
    std::atomic<int32_t>* is_moved;
  };

  // This rank's side of a pipe.
  struct Way {
    Pipe* pipe;
    int64_t to;
    uint64_t sent = 0;
    std::deque<Kept> kept;
  };

  struct Slot {
    const Way* way = nullptr;
    uint64_t piece = 0;  // that lies here until the way has received it
  };

  void keep_moving() {
    Bell& bell = peers_.own().bell;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!is_stopped_) {
      if (num_kept_.load() == 0) {
        has_kept_.wait(lock);
        continue;
      }
      const Listening listening(bell);
      while (!is_stopped_ && num_kept_.load() != 0) {
        const uint32_t rings = bell.rings.load();
        if (move_pieces()) continue;
        lock.unlock();
        bell.sleep(rings, kSleep);
        lock.lock();
      }
    }
  }

  // One of each way, so that none waits for another's whole message.
  bool move_pieces() {
    bool has_moved = false;
    for (Way& way : ways_) has_moved = (!way.kept.empty() && move_piece(way)) || has_moved;
    return has_moved;
  }

  bool move_piece(Way& way) {
    const int64_t slot = find_slot(way);
    if (slot < 0) return false;
    const GroupMemory& memory = peers_.memory();
    Kept& message = way.kept.front();
    const int64_t length = std::min(memory.shape().slot_bytes, message.bytes - message.moved);
    std::memcpy(memory.slot(peers_.index(), slot), message.from + message.moved, length);
    memory.entry(*way.pipe, way.sent) = {slot, message.bytes};
    slots_[slot] = {&way, way.sent};
    way.pipe->sent.store(++way.sent);
    peers_.ring(way.to);
    message.moved += length;
    if (message.moved == message.bytes) {
      message.is_moved->store(1);
      way.kept.pop_front();
      num_kept_.fetch_sub(1);
      peers_.own().bell.ring();
    }
    return true;
  }

  // The lowest free slot: its memory is in a cache still. A way that holds some leaves one to each that holds none, so
  // that a message waits only for those of its way. Below 0 where there is none.
  int64_t find_slot(const Way& way) const {
    int64_t num_idle = 0, num_held = 0;
    for (const Way& other : ways_) {
      if (other.to == peers_.index()) continue;
      const int64_t held = static_cast<int64_t>(other.sent - other.pipe->received.load());
      num_idle += held == 0 && &other != &way;
      num_held += held;
    }
    if (static_cast<int64_t>(slots_.size()) - num_held <= num_idle) return -1;
    int64_t slot = 0;
    while (slots_[slot].way != nullptr && slots_[slot].way->pipe->received.load() <= slots_[slot].piece) ++slot;
    return slot;
  }

  // No ring comes from a receiver that died between its two steps; others may be waiting for the slot.
  static constexpr std::chrono::milliseconds kSleep{100};

  Peers& peers_;
  std::vector<Slot> slots_;
  std::vector<Way> ways_;  // [channel][to]
  std::atomic<int64_t> num_kept_{0};
  bool is_stopped_ = false;
  std::mutex mutex_;
  std::mutex stopping_;
  std::condition_variable has_kept_;
  std::thread mover_;
};

}  // namespace muster
