//! The window: how many messages a peer may have under way, and the slots that these need.
//!
//! The receive slots of a lane are shared out to its peers. Each may send as many messages as it has
//! *credits*, which come back as its messages are worked through, so that its slots never run out ("receiver
//! not ready" never happens). Credits travel in the four immediate bytes of every message, or alone when
//! there is nothing to send.
//!
//! The slots are shared out, and not multiplied, up to `FAIR` peers: their memory does not grow with the
//! machine, whose total therefore grows with its nodes and not with their square.

/// Bytes of a message's data: a page with its head, and a few short frames beside it.
pub(super) const SLOT: usize = 4096 + 256;

/// Messages up to this length are copied into the send queue itself, if the device can.
pub(super) const INLINE: usize = 256;

/// Receive slots of a lane for messages with data, as long as each peer gets its least.
const RECEIVE_SLOTS: usize = 512;
/// The most credits of a peer: 557 KB under way, more than 100 Gbit/s hold in 40 us.
const MOST: usize = 128;
/// The least: half of them are on their way back while the other half is used.
const LEAST: usize = 8;
/// Up to that many peers the slots of a lane are shared out.
#[cfg(test)]
const FAIR: usize = RECEIVE_SLOTS / LEAST;
/// Slots for each peer's messages without data: credits alone, of which two can be under way (each returns
/// half of all), and the farewell.
pub(super) const BESIDE: usize = 3;
/// Sends that may be finished and not yet seen to be, beyond those that credits allow.
const UNSEEN: usize = 32;
/// Send slots of a lane.
pub(super) const SEND_SLOTS: usize = 256;
/// Every so many inline messages one says when it is done.
pub(super) const SIGNAL_EVERY: usize = 8;

/// The numbers of a lane, which follow from how many peers it has.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct Window {
    /// Messages with data that a peer may have under way.
    pub(super) credits: u16,
    /// Credits that are returned alone when nothing else is sent.
    pub(super) return_at: u16,
    /// Receive slots of a peer.
    pub(super) share: usize,
    /// Receive slots of the lane.
    pub(super) receive_slots: usize,
    /// Unfinished sends to one peer.
    pub(super) depth: usize,
}

impl Window {
    /// For a lane with that many peers.
    pub(super) fn new(peers: usize) -> Window {
        let credits = (RECEIVE_SLOTS / peers.max(1)).clamp(LEAST, MOST);
        Window {
            credits: credits as u16,
            return_at: (credits / 2) as u16,
            share: credits + BESIDE,
            receive_slots: peers * (credits + BESIDE),
            depth: credits + BESIDE + UNSEEN,
        }
    }
}

/// The immediate bytes: credits in the low half, and whether this is the last message.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct Immediate {
    pub(super) credits: u16,
    pub(super) farewell: bool,
}

impl Immediate {
    pub(super) fn encode(self) -> u32 {
        u32::from(self.credits) | u32::from(self.farewell) << 16
    }

    /// `None` for bytes that no node sends.
    pub(super) fn decode(word: u32) -> Option<Immediate> {
        (word >> 17 == 0).then_some(Immediate { credits: word as u16, farewell: word >> 16 != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receive_memory_does_not_grow_with_the_machine_while_slots_can_be_shared_out() {
        for peers in 4..=FAIR {
            let window = Window::new(peers);
            assert!(window.receive_slots <= RECEIVE_SLOTS + peers * BESIDE, "{peers}: {window:?}");
            assert!(usize::from(window.credits) * peers <= window.receive_slots);
        }
        assert_eq!(usize::from(Window::new(511).credits), LEAST);
    }

    #[test]
    fn a_machine_of_one_node_needs_nothing() {
        assert_eq!(Window::new(0).receive_slots, 0);
    }

    /// The argument for [`BESIDE`]: whatever the number, two returns of `return_at` use up what a peer can
    /// send.
    #[test]
    fn two_returns_under_way_are_the_most() {
        for peers in 1..512 {
            let Window { credits, return_at, .. } = Window::new(peers);
            assert!(credits / return_at <= 2 && return_at > 0);
        }
    }

    #[test]
    fn immediates_come_back_and_others_are_refused() {
        for credits in [0, 1, 128, u16::MAX] {
            for farewell in [false, true] {
                let sent = Immediate { credits, farewell };
                assert_eq!(Immediate::decode(sent.encode()), Some(sent));
            }
        }
        assert_eq!(Immediate::decode(1 << 17), None);
        assert_eq!(Immediate::decode(u32::MAX), None);
    }
}
