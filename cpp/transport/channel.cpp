// The channel's receive state machine and send queue.
#include "transport/channel.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace dualkv {

namespace {
// Bytes read from one channel before others get their turn.
constexpr std::uint64_t kReadBudgetBytes = 4u << 20;
constexpr std::size_t kMaxSendPieces = 64;
}  // namespace

std::uint64_t OutFrame::bytes() const {
  std::uint64_t total = head.size();
  for (const iovec& piece : payload) total += piece.iov_len;
  return total;
}

Channel::Channel(Progress& progress, Fd fd, ChannelOwner& owner)
    : progress_(progress), fd_(std::move(fd)), owner_(&owner) {}

Channel::~Channel() {
  if (fd_.valid()) progress_.unwatch(fd_.get());
}

void Channel::start() {
  armed_ = EPOLLIN | EPOLLOUT;
  progress_.watch(fd_.get(), armed_, [weak = weak_from_this()](std::uint32_t events) {
    if (const auto self = weak.lock()) self->on_events(events);
  });
}

void Channel::set_reading(bool reading) {
  reading_ = reading;
  rearm();
}

void Channel::rearm() {
  if (!fd_.valid()) return;
  const std::uint32_t wanted = (reading_ ? EPOLLIN : 0u) | (queue_.empty() ? 0u : EPOLLOUT);
  if (wanted == armed_) return;
  armed_ = wanted;
  progress_.rewatch(fd_.get(), wanted);
}

void Channel::on_events(std::uint32_t events) {
  if (events & (EPOLLOUT | EPOLLERR)) write_some();
  if (fd_.valid() && reading_ && (events & (EPOLLIN | EPOLLHUP | EPOLLERR))) read_some();
  if (fd_.valid() && !reading_ && (events & EPOLLHUP))
    return close({Code::kPeerLost, 0, "the peer closed the connection"});
  rearm();
}

void Channel::close(const Status& why, bool hostile) {
  if (!fd_.valid()) return;
  const auto self = shared_from_this();
  progress_.unwatch(fd_.get());
  fd_.reset();
  queue_.clear();
  queued_bytes_ = 0;
  inbound_.reset();
  owner_->on_channel_closed(*this, why, hostile);
}

bool Channel::received(ssize_t got) {
  if (got > 0) return true;
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  const int error = got < 0 ? errno : 0;
  close({Code::kPeerLost, error, error != 0 ? "the connection failed" : "the peer closed the connection"});
  return false;
}

void Channel::read_some() {
  std::uint64_t budget = kReadBudgetBytes;
  while (fd_.valid() && reading_) {
    const std::uint64_t before = inbound_ ? inbound_->bytes_left() : 0;
    const bool more = inbound_ ? read_payload() : in_body_ ? read_body() : read_header();
    if (!more) return;
    const std::uint64_t used = before > 0 ? before - (inbound_ ? inbound_->bytes_left() : 0) : FrameHeader::kBytes;
    if (used >= budget) return;  // level-triggered: the loop comes back
    budget -= used;
  }
}

bool Channel::read_header() {
  const ssize_t got = recv(fd_.get(), header_bytes_.data() + filled_, header_bytes_.size() - filled_, 0);
  if (!received(got)) return false;
  filled_ += static_cast<std::size_t>(got);
  if (filled_ < header_bytes_.size()) return true;
  const auto header = decode_header(header_bytes_);
  if (!header || (!proven_ && !is_handshake(header->type))) {
    close({Code::kRefused, 0, "the peer sent something that is not a frame"}, /*hostile=*/true);
    return false;
  }
  header_ = *header;
  body_.resize(header_.body_bytes);
  filled_ = 0;
  in_body_ = true;
  if (body_.empty()) dispatch();
  return true;
}

bool Channel::read_body() {
  const ssize_t got = recv(fd_.get(), body_.data() + filled_, body_.size() - filled_, 0);
  if (!received(got)) return false;
  filled_ += static_cast<std::size_t>(got);
  if (filled_ == body_.size()) dispatch();
  return true;
}

void Channel::dispatch() {
  filled_ = 0;
  in_body_ = false;
  if (!body_is_right(header_, body_) || !owner_->on_frame(*this, header_.type, body_)) {
    close({Code::kRefused, 0, "the peer sent a malformed frame"}, /*hostile=*/true);
  }
}

bool Channel::read_payload() {
  std::array<iovec, InboundWrite::kMaxPieces> pieces;
  const std::size_t count = inbound_->next(pieces);
  const ssize_t got = readv(fd_.get(), pieces.data(), static_cast<int>(count));
  if (!received(got)) return false;
  inbound_->advance(static_cast<std::uint64_t>(got));
  if (inbound_->bytes_left() > 0) return true;
  const auto write = std::move(inbound_);
  owner_->on_payload(*this, *write);
  return true;
}

void Channel::send(OutFrame frame) {
  if (!fd_.valid()) return;
  queued_bytes_ += frame.bytes();
  queue_.push_back(std::move(frame));
  // Coalesces what one turn of the loop queues; a full socket waits for EPOLLOUT anyway.
  rearm();
}

namespace {

// The frame's bytes from `skip` on, as pieces. Returns how many there are.
std::size_t pieces_of(const OutFrame& frame, std::uint64_t skip, std::span<iovec> out) {
  std::size_t count = 0;
  const auto add = [&](const void* data, std::uint64_t bytes) {
    const std::uint64_t passed = std::min(skip, bytes);
    skip -= passed;
    if (passed == bytes || count == out.size()) return;
    out[count++] = {const_cast<std::byte*>(static_cast<const std::byte*>(data)) + passed, bytes - passed};
  };
  add(frame.head.data(), frame.head.size());
  for (const iovec& piece : frame.payload) add(piece.iov_base, piece.iov_len);
  return count;
}

}  // namespace

void Channel::write_some() {
  while (fd_.valid() && !queue_.empty()) {
    OutFrame& frame = queue_.front();
    std::array<iovec, kMaxSendPieces> pieces;
    msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = pieces_of(frame, frame.sent, pieces);
    const ssize_t put = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOTCONN)) return;
    if (put < 0) return close({Code::kPeerLost, errno, "the connection failed"});
    frame.sent += static_cast<std::uint64_t>(put);
    queued_bytes_ -= static_cast<std::uint64_t>(put);
    if (frame.sent == frame.bytes()) queue_.pop_front();
  }
  if (closing_ && fd_.valid()) close({Code::kRefused, 0, "refused"});
}

void Channel::close_after_sending() {
  closing_ = true;
  reading_ = false;
  rearm();
}

bool Channel::withdraw(std::uint64_t write_id) {
  const auto found =
      std::find_if(queue_.begin(), queue_.end(), [&](const OutFrame& f) { return f.write_id == write_id; });
  if (found == queue_.end()) return false;
  if (found->sent == 0) {
    queued_bytes_ -= found->bytes();
    queue_.erase(found);
    return true;
  }
  found->write_id = 0;
  for (const iovec& piece : found->payload) {
    const auto* data = static_cast<const std::byte*>(piece.iov_base);
    found->copy.insert(found->copy.end(), data, data + piece.iov_len);
  }
  if (!found->copy.empty()) found->payload = {{found->copy.data(), found->copy.size()}};
  return false;
}

}  // namespace dualkv
