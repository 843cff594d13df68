// Collectives between processes that share memory. A collective goes in rounds: fill the outbox, say so, wait until the
// others have said so, take from theirs.

#include "messages.h"
#include "vectors.h"

namespace muster {
namespace {

class Group {
 public:
  Group(const GroupMemory& memory, int64_t index, std::chrono::microseconds spin, std::chrono::duration<double> timeout)
      : peers_(memory, index, spin, timeout), messages_(peers_) {}
  ~Group() { leave(); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  Peers& peers() { return peers_; }
  Messages& messages() { return messages_; }

  void leave() {
    peers_.leave();
    messages_.stop();
  }

  int64_t all_gather(const char* x, char* out, int64_t bytes) {
    const int64_t most = peers_.memory().shape().outbox_bytes;
    for (int64_t at = 0; at < bytes; at += most) {
      const int64_t length = std::min(most, bytes - at);
      Outbox& outbox = next_outbox();
      std::fill_n(outbox.lengths, peers_.size(), length);
      std::memcpy(GroupMemory::data(outbox), x + at, length);
      post();
      std::memcpy(out + peers_.index() * bytes + at, x + at, length);
      const int64_t end = take_from_each([&](int64_t rank, Outbox& other) {
        if (other.lengths[peers_.index()] != length) return false;
        std::memcpy(out + rank * bytes + at, GroupMemory::data(other), length);
        return true;
      });
      if (end != kDone) return end;
    }
    return kDone;
  }

  // Adds in order of index, from 0 on.
  int64_t reduce_scatter(const float* x, float* out, int64_t length) {
    const int64_t bytes = length * static_cast<int64_t>(sizeof(float)), own = peers_.index();
    const float* parts[kMaxRanks];
    for (int64_t at = 0; at < bytes; at += part_bytes()) {
      post_parts(reinterpret_cast<const char*>(x), [=](int64_t) { return bytes; }, at);
      const int64_t end = take_from_each([&](int64_t rank, Outbox& other) {
        parts[rank] = reinterpret_cast<const float*>(part(other, own));
        return other.lengths[own] == piece_of(bytes, at);
      });
      if (end != kDone) return end;
      parts[own] = x + own * length + at / static_cast<int64_t>(sizeof(float));
      add(parts, peers_.size(), out + at / static_cast<int64_t>(sizeof(float)),
          piece_of(bytes, at) / static_cast<int64_t>(sizeof(float)));
    }
    return kDone;
  }

  // sent(rank) and received(rank) are bytes; the parts lie one behind the other in order of index.
  template <class Sent, class Received>
  int64_t all_to_all(const char* x, char* out, Sent sent, Received received) {
    const int64_t own = peers_.index();
    if (sent(own) != received(own)) return ended(kUnequal, own);
    char* to[kMaxRanks];
    for (int64_t rank = 0; rank < peers_.size(); ++rank) {
      to[rank] = out;
      out += received(rank);
    }
    bool has_more = true;
    for (int64_t at = 0; has_more; at += part_bytes()) {
      const char* mine = nullptr;
      has_more = post_parts(x, sent, at, &mine);
      if (at == 0 && sent(own) > 0) std::memcpy(to[own], mine, sent(own));
      const int64_t end = take_from_each([&](int64_t rank, Outbox& other) {
        const int64_t length = piece_of(received(rank), at);
        if (other.lengths[own] != length) return false;
        if (length > 0) std::memcpy(to[rank] + at, part(other, own), length);
        has_more = has_more || other.has_more != 0;
        return true;
      });
      if (end != kDone) return end;
    }
    return kDone;
  }

 private:
  Outbox& next_outbox() { return peers_.memory().outbox(peers_.index(), ++round_); }

  void post() {
    peers_.own().round.store(round_);
    peers_.ring_all();
  }

  // Posts bytes [at, at + part_bytes()) of what each other rank gets, and says whether there are more.
  template <class Sent>
  bool post_parts(const char* x, Sent sent, int64_t at, const char** mine = nullptr) {
    Outbox& outbox = next_outbox();
    bool has_more = false;
    for (int64_t rank = 0; rank < peers_.size(); ++rank) {
      if (rank == peers_.index()) {
        if (mine != nullptr) *mine = x;
      } else {
        const int64_t length = piece_of(sent(rank), at);
        if (length > 0) std::memcpy(part(outbox, rank), x + at, length);
        outbox.lengths[rank] = length;
        has_more = has_more || sent(rank) > at + length;
      }
      x += sent(rank);
    }
    outbox.has_more = has_more;
    post();
    return has_more;
  }

  // Calls take(rank, outbox) for each other rank as soon as it has posted this round; false is that sizes differ.
  template <class Take>
  int64_t take_from_each(Take take) {
    for (int64_t step = 1; step < peers_.size(); ++step) {
      const int64_t rank = (peers_.index() + step) % peers_.size();
      const auto has_posted = [this](int64_t other) { return peers_.memory().member(other).round.load() >= round_; };
      const int64_t end = peers_.wait([&] { return has_posted(rank); }, [&](int64_t other) { return !has_posted(other); },
                                      [this] { messages_.help(); });
      if (end != kDone) return end;
      if (!take(rank, peers_.memory().outbox(rank, round_))) return ended(kUnequal, rank);
    }
    return kDone;
  }

  static void add(const float* const* parts, int64_t count, float* out, int64_t length) {
    for (int64_t at = 0; at < length; at += kLanes) {
      Vector sum{};
      for (int64_t rank = 0; rank < count; ++rank) sum += load_part(parts[rank] + at, length - at);
      store_part(out + at, sum, length - at);
    }
  }

  // Each rank's share of an outbox.
  int64_t part_bytes() const { return peers_.memory().shape().outbox_bytes / peers_.size() / kLine * kLine; }
  char* part(Outbox& outbox, int64_t rank) const { return GroupMemory::data(outbox) + rank * part_bytes(); }
  int64_t piece_of(int64_t bytes, int64_t at) const {
    return std::max<int64_t>(0, std::min(part_bytes(), bytes - at));
  }

  Peers peers_;
  Messages messages_;
  uint64_t round_ = 0;
};

}  // namespace
}  // namespace muster

using namespace muster;

extern "C" {

// Bytes of the memory of a group. It is shared, aligned to a page, and zeros before the first rank joins.
int64_t muster_group_bytes(const GroupShape* shape) { return GroupMemory(nullptr, *shape).num_bytes(); }

// Joins a group as the rank `index` of it. `spin_us` is how long a wait keeps its core before it gives it away.
void* muster_group_join(void* memory, const GroupShape* shape, int64_t index, int64_t spin_us, double timeout_s) {
  const std::chrono::duration<double> timeout(timeout_s);
  return new Group(GroupMemory(memory, *shape), index, std::chrono::microseconds(spin_us), timeout);
}

// All that return an int64_t from here on wait, and give a Status and, from bit 8 on, a rank.

// Waits until all ranks have joined: before anything else.
int64_t muster_group_meet(void* group, double timeout_s) {
  return static_cast<Group*>(group)->peers().meet(std::chrono::duration<double>(timeout_s));
}

// x [bytes]; out [size][bytes].
int64_t muster_all_gather(void* group, const char* x, char* out, int64_t bytes) {
  return static_cast<Group*>(group)->all_gather(x, out, bytes);
}

// x [size][length]; out [length].
int64_t muster_reduce_scatter(void* group, const float* x, float* out, int64_t length) {
  return static_cast<Group*>(group)->reduce_scatter(x, out, length);
}

// x and out [size][bytes].
int64_t muster_all_to_all(void* group, const char* x, char* out, int64_t bytes) {
  const auto even = [=](int64_t) { return bytes; };
  return static_cast<Group*>(group)->all_to_all(x, out, even, even);
}

// sent and received [size], in bytes.
int64_t muster_all_to_all_uneven(void* group, const char* x, char* out, const int64_t* sent, const int64_t* received) {
  return static_cast<Group*>(group)->all_to_all(
      x, out, [=](int64_t rank) { return sent[rank]; }, [=](int64_t rank) { return received[rank]; });
}

// Does not wait: x is read until `is_moved` is not 0, or the group is left.
int64_t muster_send(void* group, const char* x, int64_t bytes, int64_t to, int64_t channel, int32_t* is_moved) {
  return static_cast<Group*>(group)->messages().send(x, bytes, to, channel,
                                                     reinterpret_cast<std::atomic<int32_t>*>(is_moved));
}

// Waits until what was sent to `to` with `is_moved` need not be read any more.
int64_t muster_await_moved(void* group, const int32_t* is_moved, int64_t to) {
  return static_cast<Group*>(group)->messages().await_moved(*reinterpret_cast<const std::atomic<int32_t>*>(is_moved), to);
}

int64_t muster_receive(void* group, char* out, int64_t bytes, int64_t from, int64_t channel) {
  return static_cast<Group*>(group)->messages().receive(out, bytes, from, channel);
}

// From any thread: waits of this rank, and others' for it, end. Reads nothing more of what was sent. Idempotent.
void muster_group_leave(void* group) { static_cast<Group*>(group)->leave(); }

// When no call is under way any more, and before the memory goes.
void muster_group_free(void* group) { delete static_cast<Group*>(group); }

}  // extern "C"
