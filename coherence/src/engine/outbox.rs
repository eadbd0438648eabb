//! The outbox: messages of a shard, gathered so that those for one node leave together.
//!
//! While a shard works through what has arrived, its answers wait here, and those for one node then take one
//! system call, and wake its shard once: the pages of a reader's window, the grant of an upgrade and the
//! home's own acknowledgement. Demands on third nodes do not wait: these have work to do before the requester
//! can go on.
//!
//! Messages to one node leave in the order in which they were sent; the shard's lane promises that.

use std::sync::Arc;

use fabric::{FabricError, LaneId, NodeId, Transport};

use super::lent::Lent;
use crate::memory::DualMemory;
use crate::page::{PAGE_SIZE, Page};
use crate::protocol::{Head, Kind, Message};

/// Messages that wait, at most.
const MOST: usize = 16;

/// Where a message's body is, if it has one.
pub enum Source {
    /// In the page's frame.
    Frame,
    /// In a copy of it: the frame may change.
    Copy(Box<[u8; PAGE_SIZE]>),
    /// In a device's buffer.
    Lent(Lent),
}

/// A message and whom it is for.
pub struct Outgoing {
    pub to: NodeId,
    pub message: Message,
    pub source: Source,
    /// The body is all zeroes and is left out.
    pub zero: bool,
}

/// The messages that wait. What is sent of a frame is what is there at the flush: until then nobody may
/// change it.
pub struct Outbox {
    transport: Arc<dyn Transport>,
    lane: LaneId,
    waiting: Vec<Outgoing>,
    /// For copies.
    spare: Vec<Box<[u8; PAGE_SIZE]>>,
    /// Whether more messages may follow at once.
    gathering: bool,
}

impl Outbox {
    /// Nothing waits; what is sent takes that lane.
    pub fn new(transport: Arc<dyn Transport>, lane: LaneId) -> Outbox {
        Outbox { transport, lane, waiting: Vec::new(), spare: Vec::new(), gathering: false }
    }

    /// The lane of all messages.
    pub fn lane(&self) -> LaneId {
        self.lane
    }

    /// Whether more messages may follow at once.
    pub fn is_gathering(&self) -> bool {
        self.gathering
    }

    /// Says from now on whether more messages may follow at once; what was said before.
    pub fn gather(&mut self, gathering: bool) -> bool {
        std::mem::replace(&mut self.gathering, gathering)
    }

    /// Sends the message, or keeps it for the next [`Outbox::flush`].
    ///
    /// # Safety
    /// The frames of messages whose bytes are there must satisfy [`DualMemory::frame`] until the flush.
    pub unsafe fn send(&mut self, outgoing: Outgoing, memory: &DualMemory) -> Result<(), FabricError> {
        let demand = matches!(
            outgoing.message.kind,
            Kind::Invalidate { .. } | Kind::ForwardShared { .. } | Kind::ForwardExclusive { .. }
        );
        let may_wait = self.gathering && !demand;
        let follows = self.waiting.iter().any(|waiting| waiting.to == outgoing.to);
        if self.waiting.len() >= MOST || (follows && !may_wait) {
            // SAFETY: the caller's promise, for the messages that wait.
            unsafe { self.flush(memory) }?;
        }
        if may_wait {
            self.waiting.push(outgoing);
            return Ok(());
        }
        let head = outgoing.message.head(outgoing.zero);
        // SAFETY: the caller's promise, for this message.
        let body = unsafe { outgoing.body(memory) }.map_or(&[][..], |body| body);
        self.transport.send(outgoing.to, self.lane, &[head.as_bytes(), body])?;
        self.spare.extend(outgoing.copy());
        Ok(())
    }

    /// Sends what waits.
    ///
    /// # Safety
    /// As [`Outbox::send`].
    pub unsafe fn flush(&mut self, memory: &DualMemory) -> Result<(), FabricError> {
        while let Some(to) = self.waiting.first().map(|waiting| waiting.to) {
            let together = self.waiting.iter().filter(|waiting| waiting.to == to);
            let (mut heads, mut frames, mut count) = ([Head::default(); MOST], [[&[][..]; 2]; MOST], 0);
            for (head, waiting) in heads.iter_mut().zip(together.clone()) {
                *head = waiting.message.head(waiting.zero);
                count += 1;
            }
            for ((frame, head), waiting) in frames.iter_mut().zip(&heads).zip(together) {
                // SAFETY: the caller's promise.
                let body = unsafe { waiting.body(memory) }.map_or(&[][..], |body| body);
                *frame = [head.as_bytes(), body];
            }
            match &frames[..count] {
                [frame] => self.transport.send(to, self.lane, frame)?,
                frames => self.transport.send_all(to, self.lane, frames)?,
            }
            let sent = self.waiting.extract_if(.., |waiting| waiting.to == to);
            self.spare.extend(sent.filter_map(Outgoing::copy));
        }
        Ok(())
    }

    /// A copy of a page's frame as it is now, to be sent.
    pub fn copy(&mut self, page: Page, memory: &DualMemory) -> Source {
        let mut bytes = self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE_SIZE]));
        memory.read_to(page, &mut bytes);
        Source::Copy(bytes)
    }

    /// Whether a message about the page waits.
    pub fn has(&self, page: Page) -> bool {
        self.waiting.iter().any(|waiting| waiting.message.page == page)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

impl Outgoing {
    /// The bytes that go with the message, if they are not left out.
    ///
    /// # Safety
    /// As [`DualMemory::frame`], if they are there.
    pub unsafe fn body<'a>(&'a self, memory: &'a DualMemory) -> Option<&'a [u8; PAGE_SIZE]> {
        match &self.source {
            _ if self.zero || !self.message.kind.has_body() => None,
            // SAFETY: the caller's promise.
            Source::Frame => Some(unsafe { memory.frame(self.message.page) }),
            Source::Copy(bytes) => Some(bytes),
            Source::Lent(bytes) => Some(bytes),
        }
    }

    /// The copy that was made for it, if one was.
    fn copy(self) -> Option<Box<[u8; PAGE_SIZE]>> {
        match self.source {
            Source::Copy(bytes) => Some(bytes),
            Source::Frame | Source::Lent(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use fabric::{Receiver, TransportStats};

    use super::*;
    use crate::protocol::Rights;

    /// Notes each call: to whom, and how long its frames are.
    #[derive(Default)]
    struct Notes(Mutex<Vec<(u16, Vec<usize>)>>);

    impl Transport for Notes {
        fn node(&self) -> NodeId {
            NodeId(0)
        }
        fn nodes(&self) -> usize {
            9
        }
        fn lanes(&self) -> usize {
            1
        }
        fn send(&self, to: NodeId, _: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
            self.0.lock().unwrap().push((to.0, vec![parts.iter().map(|part| part.len()).sum()]));
            Ok(())
        }
        fn send_all(&self, to: NodeId, _: LaneId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
            let lengths = frames.iter().map(|frame| frame[0].len() + frame[1].len()).collect();
            self.0.lock().unwrap().push((to.0, lengths));
            Ok(())
        }
        fn take_receiver(&self, _: LaneId) -> Option<Box<dyn Receiver>> {
            None
        }
        fn stats(&self) -> TransportStats {
            TransportStats::default()
        }
    }

    const DATA: Kind = Kind::Data { rights: Rights::Shared, acks: 0, body: true, run: 0 };

    fn sent(gathering: bool, messages: &[(u16, Kind)]) -> Vec<(u16, Vec<usize>)> {
        let (notes, memory) = (Arc::new(Notes::default()), DualMemory::new(4).unwrap());
        let mut outbox = Outbox::new(notes.clone(), 0);
        outbox.gather(gathering);
        for &(to, kind) in messages {
            let message = Message { page: Page(1), kind };
            let outgoing = Outgoing { to: NodeId(to), message, source: Source::Frame, zero: false };
            // SAFETY: nobody else uses the memory.
            unsafe { outbox.send(outgoing, &memory) }.unwrap();
        }
        // SAFETY: as above.
        unsafe { outbox.flush(&memory) }.unwrap();
        assert!(outbox.is_empty());
        std::mem::take(&mut *notes.0.lock().unwrap())
    }

    #[test]
    fn answers_to_one_node_leave_together_and_demands_before_them() {
        let invalidate = Kind::Invalidate { requester: NodeId(1) };
        let messages = [(1, DATA), (2, invalidate), (3, invalidate), (1, Kind::Ack)];
        assert_eq!(sent(true, &messages), [(2, vec![16]), (3, vec![16]), (1, vec![16 + PAGE_SIZE, 16])]);
    }

    #[test]
    fn a_demand_does_not_pass_what_was_sent_to_the_same_node_before() {
        let demand = Kind::ForwardShared { requester: NodeId(2) };
        let messages = [(1, Kind::Ack), (2, DATA), (1, demand), (1, DATA)];
        assert_eq!(
            sent(true, &messages),
            [(1, vec![16]), (2, vec![16 + PAGE_SIZE]), (1, vec![16]), (1, vec![16 + PAGE_SIZE])]
        );
    }

    #[test]
    fn nothing_waits_where_nothing_follows() {
        assert_eq!(sent(false, &[(1, Kind::Ack), (1, Kind::Ack)]), [(1, vec![16]), (1, vec![16])]);
    }

    #[test]
    fn only_so_many_wait() {
        let calls = sent(true, &[(1, Kind::Ack); MOST + 3]);
        assert_eq!(calls, [(1, vec![16; MOST]), (1, vec![16; 3])]);
    }
}
