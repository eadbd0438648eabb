//! The receiving side of queue pairs: the slots that messages arrive in, and the queue that says so.
//!
//! ```text
//! ReceiveQueue::new ──> Shares ── Qp::bind ──> the device's ── take ──> Received ── Qp::refill ──> the device's
//!                         ^                                                                           │
//!                         └── renew <── SpentShare <── Qp::destroy <──────────────────────────────────┘
//! ```
//!
//! A [`Share`] is the right to receive into a part of the slots. It cannot be cloned, and a queue pair keeps
//! it until it is destroyed: so no slot is ever given to two queue pairs, and the memory outlives all of
//! them. Completions of a queue pair that was destroyed may still be in the queue; they carry the generation
//! of its share and are passed over once the share was renewed. Renewing, giving slots back and taking
//! messages all need the one [`ReceiveQueue`] for themselves, so none of that happens while somebody reads a
//! message.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::completion::{Channel, Cq};
use super::ffi::{Sge, WC_WITH_IMM, Wc, status};
use super::memory::Slots;

/// Completions taken from the device at once, and slots given to it.
pub const BATCH: usize = 32;

/// The slots, and the completion queue of those who receive into them.
pub struct ReceiveMemory {
    cq: Cq,
    slots: Slots,
}

/// The user's side of the slots.
pub struct ReceiveQueue {
    memory: Arc<ReceiveMemory>,
    /// Slots of a share.
    share: usize,
    /// By share: how often it was renewed.
    generations: Vec<u32>,
    /// Completions that were fetched: those from `next` to `fetched` were not taken yet.
    completions: [Wc; BATCH],
    next: usize,
    fetched: usize,
    /// Slots whose messages were taken, and which were not given back.
    taken: Vec<u16>,
}

/// The right to receive into a part of the slots.
pub struct Share {
    memory: Arc<ReceiveMemory>,
    number: usize,
    slots: Range<u16>,
    generation: u32,
}

/// A share whose queue pair is gone.
pub struct SpentShare(Share);

/// A message that arrived, or failed to.
pub struct Received<'a> {
    /// The number of the share that it came in.
    pub share: usize,
    /// `enum ibv_wc_status`: unless it is success, there is nothing else.
    pub status: u32,
    /// The four bytes beside the data.
    pub immediate: Option<u32>,
    /// The data.
    pub bytes: &'a [u8],
}

impl ReceiveMemory {
    pub(super) fn cq(&self) -> &Cq {
        &self.cq
    }
}

impl ReceiveQueue {
    /// A queue for all `slots`, whose events go to `channel` under the number `tag`, and the shares of
    /// `share` slots each that there are.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(
        channel: &Arc<Channel>,
        tag: usize,
        slots: Slots,
        share: usize,
    ) -> io::Result<(ReceiveQueue, Vec<Share>)> {
        let count = slots.count();
        if share == 0 || u16::try_from(count).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let memory = Arc::new(ReceiveMemory { cq: Cq::new(channel, count, tag)?, slots });
        let slots_of = |number: usize| (number * share) as u16..((number + 1) * share) as u16;
        let shares = (0..count / share).map(|number| {
            let (memory, slots) = (memory.clone(), slots_of(number));
            Share { memory, number, slots, generation: 0 }
        });
        let shares: Vec<Share> = shares.collect();
        let queue = ReceiveQueue {
            memory,
            share,
            generations: vec![0; shares.len()],
            completions: [Wc::default(); BATCH],
            next: 0,
            fetched: 0,
            taken: Vec::with_capacity(BATCH),
        };
        Ok((queue, shares))
    }

    /// The memory, for queue pairs.
    pub fn memory(&self) -> &Arc<ReceiveMemory> {
        &self.memory
    }

    /// Fetches completions from the device unless there are some; whether there are any. Slots of messages
    /// that were taken before and not given back are not used again by their queue pairs.
    ///
    /// # Errors
    /// The queue overran or the device is gone.
    pub fn fetch(&mut self) -> io::Result<bool> {
        if !self.has_fetched() {
            self.taken.clear();
            (self.next, self.fetched) = (0, 0);
            self.fetched = self.memory.cq.poll(&mut self.completions)?;
        }
        Ok(self.has_fetched())
    }

    /// Whether completions were fetched and not taken yet.
    pub fn has_fetched(&self) -> bool {
        self.next < self.fetched
    }

    /// The next message of those that were fetched.
    pub fn take(&mut self) -> Option<Received<'_>> {
        loop {
            let wc = self.completions[..self.fetched].get(self.next).copied()?;
            self.next += 1;
            let (generation, slot) = parts(wc.wr_id);
            let share = usize::from(slot) / self.share;
            // One of a queue pair that was destroyed since.
            if self.generations.get(share) != Some(&generation) {
                continue;
            }
            let mut received = Received { share, status: wc.status, immediate: None, bytes: &[] };
            if wc.status == status::SUCCESS {
                let (with_immediate, len) = (wc.wc_flags & WC_WITH_IMM != 0, wc.byte_len as usize);
                received.immediate = with_immediate.then(|| u32::from_be(wc.imm_data));
                self.taken.push(slot);
                // SAFETY: the completion says that the device is done with the slot. It gets the slot again
                // after `untake`, or with the whole share after `renew`, and both need `self`, which is
                // borrowed meanwhile.
                received.bytes = unsafe { self.memory.slots.read(usize::from(slot), len) };
            }
            return Some(received);
        }
    }

    /// The slots of `share` whose messages were taken, and how many they are. They are their queue pair's
    /// again.
    pub(super) fn untake(&mut self, share: &Share) -> ([u16; BATCH], usize) {
        let (mut slots, mut count) = ([0; BATCH], 0);
        if self.is_current(share) {
            self.taken.retain(|slot| {
                let is_its = share.slots.contains(slot);
                if is_its {
                    slots[count] = *slot;
                    count += 1;
                }
                !is_its
            });
        }
        (slots, count)
    }

    /// Makes a share usable for another queue pair. What the one before it left in the queue is passed over.
    pub fn renew(&mut self, SpentShare(mut share): SpentShare) -> Share {
        assert!(self.is_current(&share), "a share of this queue");
        share.generation = share.generation.wrapping_add(1);
        self.generations[share.number] = share.generation;
        self.taken.retain(|slot| !share.slots.contains(slot));
        share
    }

    /// Lets the next completion raise an event.
    ///
    /// # Errors
    /// What the device says.
    pub fn notify(&self) -> io::Result<()> {
        self.memory.cq.notify(false)
    }

    fn is_current(&self, share: &Share) -> bool {
        Arc::ptr_eq(&share.memory, &self.memory) && self.generations[share.number] == share.generation
    }
}

impl Share {
    /// Gives it up without a queue pair.
    pub fn spend(self) -> SpentShare {
        SpentShare(self)
    }

    pub(super) fn is_of(&self, memory: &Arc<ReceiveMemory>) -> bool {
        Arc::ptr_eq(&self.memory, memory)
    }

    pub(super) fn slots(&self) -> Range<u16> {
        self.slots.clone()
    }

    /// A slot for a work request: its id and its place.
    pub(super) fn work(&self, slot: u16) -> (u64, Sge) {
        assert!(self.slots.contains(&slot), "a slot of this share");
        let slots = &self.memory.slots;
        (work_id(self.generation, slot), slots.sge(usize::from(slot), slots.slot()))
    }
}

/// A work request's id: the generation of the share, and the slot.
fn work_id(generation: u32, slot: u16) -> u64 {
    u64::from(generation) << 32 | u64::from(slot)
}

fn parts(work_id: u64) -> (u32, u16) {
    ((work_id >> 32) as u32, work_id as u16)
}

#[cfg(test)]
mod tests {
    use super::super::fake;
    use super::super::memory::Pd;
    use super::super::queue::{Data, Message, Qp, Queues, Route};
    use super::super::send::SendQueue;
    use super::*;

    const SLOT: usize = 64;
    const SHARE: usize = 4;

    /// A side of one connection after the other, with its queues and the share that it was given.
    struct Side {
        queues: Queues,
        queue: ReceiveQueue,
        share: Option<Share>,
    }

    fn side() -> Side {
        let context = fake::context();
        let channel = Channel::new(&context).unwrap();
        let pd = Pd::new(&context).unwrap();
        let slots = Slots::new(&pd, SLOT, 3 * SHARE).unwrap();
        let (queue, mut shares) = ReceiveQueue::new(&channel, 0, slots, SHARE).unwrap();
        let send = SendQueue::new(&channel, 16, 1).unwrap();
        let share = Some(shares.remove(1));
        Side { queues: Queues { pd, send, receive: queue.memory().clone() }, queue, share }
    }

    /// A queue pair at each side, connected to each other.
    fn connect(sides: [&mut Side; 2]) -> [Qp; 2] {
        let mut pairs =
            sides.each_ref().map(|side| Qp::new(&side.queues, 0, 16, SHARE as u32, SLOT).unwrap());
        let numbers = [pairs[1].number(), pairs[0].number()];
        for ((side, pair), qpn) in sides.into_iter().zip(&mut pairs).zip(numbers) {
            pair.bind(1, side.share.take().unwrap()).unwrap();
            pair.connect(&Route { qpn, ..Route::default() }).unwrap();
        }
        pairs
    }

    fn send(pair: &mut Qp, text: &[u8]) {
        pair.post(Message { immediate: 7, data: Data::Inline(text), signaled: false }).unwrap();
    }

    /// The messages that have come.
    fn take(queue: &mut ReceiveQueue) -> Vec<Vec<u8>> {
        queue.fetch().unwrap();
        let mut messages = Vec::new();
        while let Some(received) = queue.take() {
            if received.status == status::SUCCESS {
                assert_eq!((received.share, received.immediate), (1, Some(7)));
                messages.push(received.bytes.to_vec());
            }
        }
        messages
    }

    #[test]
    fn every_slot_is_of_one_share() {
        let context = fake::context();
        let (channel, pd) = (Channel::new(&context).unwrap(), Pd::new(&context).unwrap());
        let slots = Slots::new(&pd, SLOT, 5 * SHARE).unwrap();
        let (_, shares) = ReceiveQueue::new(&channel, 0, slots, SHARE).unwrap();
        let all: Vec<u16> = shares.iter().flat_map(Share::slots).collect();
        assert_eq!(all, (0..5 * SHARE as u16).collect::<Vec<_>>());
    }

    #[test]
    fn slots_are_used_again_once_they_are_given_back() {
        let (mut near, mut far) = (side(), side());
        let [mut sender, receiver] = connect([&mut near, &mut far]);
        for round in 0..3 * SHARE as u8 {
            send(&mut sender, &[round; 9]);
            assert_eq!(take(&mut far.queue), [[round; 9]]);
            receiver.refill(&mut far.queue).unwrap();
        }
    }

    #[test]
    fn what_a_destroyed_queue_pair_left_is_passed_over_and_its_slots_serve_the_next_one() {
        let (mut near, mut far) = (side(), side());
        let [mut sender, receiver] = connect([&mut near, &mut far]);
        send(&mut sender, b"taken, and not given back");
        assert_eq!(take(&mut far.queue).len(), 1);
        send(&mut sender, b"fetched, and not taken");
        assert!(far.queue.fetch().unwrap());
        send(&mut sender, b"never fetched");
        receiver.fail().unwrap();
        for (side, pair) in [(&mut near, sender), (&mut far, receiver)] {
            let share = pair.destroy().share.unwrap();
            side.share = Some(side.queue.renew(share));
        }
        let [mut sender, receiver] = connect([&mut near, &mut far]);
        assert_eq!(take(&mut far.queue), [[0; 0]; 0]);
        // Nothing of the last one is on the list, so no slot is given twice: all are needed, each once.
        receiver.refill(&mut far.queue).unwrap();
        (0..SHARE as u8).for_each(|i| send(&mut sender, &[i; 5]));
        assert_eq!([take(&mut far.queue), take(&mut far.queue)].concat(), [0, 1, 2, 3].map(|i| [i; 5]));
        send(&mut sender, b"there is no slot for this");
        assert_eq!(take(&mut far.queue), [[0; 0]; 0]);
    }

    #[test]
    #[should_panic(expected = "a share of its own queue")]
    fn a_share_serves_no_queue_pair_of_another_queue() {
        let (mut near, far) = (side(), side());
        let mut pair = Qp::new(&far.queues, 0, 16, SHARE as u32, SLOT).unwrap();
        let _ = pair.bind(1, near.share.take().unwrap());
    }
}
