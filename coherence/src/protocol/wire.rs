//! The wire form of messages: heads of fixed lengths, every field checked, exactly one encoding of each
//! message.

use fabric::NodeId;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::Rights;
use super::message::{Bits, Kind, MAX_RUN, Message};
use super::operation::{Action, Operation, Width};
use crate::page::{BLOCK, PAGE_SIZE, Page};
/// The bytes that come with a message, on the wire.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Body<'a> {
    /// None.
    Absent,
    /// A page of zeroes, which costs no bytes.
    Zero,
    /// The page, 4096 bytes.
    Bytes(&'a [u8; PAGE_SIZE]),
}

/// The first bytes of every frame on a coherence lane.
#[derive(Copy, Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fixed {
    code: u8,
    /// 0 none, 1 a page of zeroes, 2 bytes follow.
    body: u8,
    /// Rights of `Data` (1 shared, 2 exclusive), 1 of a Get that may be answered by `Ship`, else 0.
    rights: u8,
    /// Pages that follow, of the Gets and `Data`, else 0.
    run: u8,
    /// Acks of `Data`, requester of `Invalidate`, the forwards, `LoadAt` and `OperateAt`, pages that follow
    /// of `Discard` and `Discarded`, 1 of a `Stored` or `Operated` that is done and a `Pushed` that is taken,
    /// else 0.
    word: le::U16,
    zero2: le::U16,
    page: le::U64,
}

/// What follows in `Operate` and `OperateAt`.
#[derive(Copy, Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Asked {
    operand: [u8; 16],
    expected: [u8; 16],
    token: le::U32,
    offset: le::U16,
    action: u8,
    width: u8,
}

/// What follows in `Operated`.
#[derive(Copy, Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Answered {
    /// 0 if it was not done.
    old: [u8; 16],
    token: le::U32,
}

const FIXED: usize = size_of::<Fixed>();
const ASKED: usize = size_of::<Asked>();
const ANSWERED: usize = size_of::<Answered>();
/// The longest head. An operation and its answer are one line of a cache each.
const LONGEST: usize = FIXED + ASKED;
const _: () = assert!(FIXED == 16 && ASKED == 40 && ANSWERED == 20 && LONGEST <= 64);

/// The head of a frame on a coherence lane: all of it but the page's bytes, which follow if the message has
/// any and they are not all zero.
#[derive(Copy, Clone)]
pub struct Head {
    bytes: [u8; LONGEST],
    len: u8,
}

impl Default for Head {
    fn default() -> Head {
        Head { bytes: [0; LONGEST], len: 0 }
    }
}

impl Head {
    /// What is sent.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    fn append(&mut self, part: &[u8]) {
        let at = usize::from(self.len);
        self.bytes[at..at + part.len()].copy_from_slice(part);
        self.len += part.len() as u8;
    }
}

impl Operation {
    fn asked(&self, token: u32) -> Asked {
        Asked {
            operand: self.operand().to_le_bytes(),
            expected: self.expected().to_le_bytes(),
            token: token.into(),
            offset: self.offset().into(),
            action: self.action() as u8,
            width: self.width() as u8,
        }
    }
}

impl Asked {
    /// The requester's token, and what is to be done.
    fn read(bytes: &[u8]) -> Result<(u32, Operation), &'static str> {
        let asked =
            Asked::ref_from_bytes(bytes).map_err(|_| "sent an operation that is not as long as one")?;
        let valid = || {
            let action = Action::ALL.get(usize::from(asked.action).checked_sub(1)?)?;
            let width = Width::of(asked.width.into())?;
            let (operand, expected) =
                (u128::from_le_bytes(asked.operand), u128::from_le_bytes(asked.expected));
            Operation::new(*action, width, asked.offset.get(), operand, expected)
        };
        Ok((asked.token.get(), valid().ok_or("sent an operation that no instruction does")?))
    }
}

impl Answered {
    /// The requester's token, and the old bytes if it was `done`.
    fn read(bytes: &[u8], done: bool) -> Result<(u32, Option<Bits>), &'static str> {
        let answered = Answered::ref_from_bytes(bytes)
            .map_err(|_| "sent an operation's answer that is not as long as one")?;
        Ok((answered.token.get(), done.then_some(u128::from_le_bytes(answered.old).into())))
    }
}

impl Message {
    /// The head of the frame; `zero` tells that the body is all zeroes and is left out.
    pub fn head(&self, zero: bool) -> Head {
        let run = match self.kind {
            Kind::GetShared { run, .. } | Kind::GetExclusive { run, .. } | Kind::Data { run, .. } => run,
            _ => 0,
        };
        let (rights, word) = match self.kind {
            Kind::GetShared { may_ship, .. } | Kind::GetExclusive { may_ship, .. } => (may_ship.into(), 0),
            Kind::Data { rights, acks, .. } => (rights as u8, acks),
            Kind::Invalidate { requester }
            | Kind::ForwardShared { requester }
            | Kind::ForwardExclusive { requester }
            | Kind::LoadAt { requester }
            | Kind::OperateAt { requester, .. } => (0, requester.0),
            Kind::Discard { run } | Kind::Discarded { run } => (0, run),
            Kind::Stored { done } | Kind::Pushed { taken: done } => (0, done.into()),
            Kind::Operated { old, .. } => (0, old.is_some().into()),
            _ => (0, 0),
        };
        let body = match (self.kind.has_body(), zero) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => 2,
        };
        let fixed = Fixed {
            code: self.kind.code(),
            body,
            rights,
            run,
            word: word.into(),
            zero2: 0.into(),
            page: self.page.0.into(),
        };
        let mut head = Head::default();
        head.append(fixed.as_bytes());
        match self.kind {
            Kind::Operate { token, operation } | Kind::OperateAt { token, operation, .. } => {
                head.append(operation.asked(token).as_bytes());
            }
            Kind::Operated { token, old } => {
                let old = old.map_or(0, u128::from).to_le_bytes();
                head.append(Answered { old, token: token.into() }.as_bytes());
            }
            _ => {}
        }
        head
    }

    /// Reads a frame. Every field is checked against its form; what the message means is the protocol's to
    /// judge.
    ///
    /// # Errors
    /// The end of a sentence that begins with the peer's name.
    pub fn parse(frame: &[u8], nodes: usize, pages: u64) -> Result<(Message, Body<'_>), &'static str> {
        let (head, rest) =
            Fixed::ref_from_prefix(frame).map_err(|_| "sent a coherence frame that is too short")?;
        let (more, rest) = rest.split_at(match head.code {
            21 | 22 => rest.len().min(ASKED),
            23 => rest.len().min(ANSWERED),
            _ => 0,
        });
        let body = match (head.body, rest.len()) {
            (0, 0) => Body::Absent,
            (1, 0) => Body::Zero,
            (2, _) => Body::Bytes(rest.try_into().map_err(|_| "sent a page that is not 4096 bytes long")?),
            _ => return Err("sent a coherence frame whose body does not fit its length"),
        };
        let has_body = body != Body::Absent;
        if head.page.get() >= pages {
            return Err("named a page beyond the guest's memory");
        }
        if head.run > MAX_RUN || head.page.get() + u64::from(head.run) >= pages {
            return Err("asked for or granted a run of pages that is too long");
        }
        let (word, run) = (head.word.get(), head.run);
        let discarded = || match u64::from(word) < BLOCK && head.page.get() + u64::from(word) < pages {
            true => Ok(word),
            false => Err("named a run of pages to discard that is too long"),
        };
        let requester = || match usize::from(word) < nodes {
            true => Ok(NodeId(word)),
            false => Err("named a node that does not exist"),
        };
        let may_ship = head.rights == 1;
        let kind = match head.code {
            1 => Kind::GetShared { run, may_ship },
            2 => Kind::GetExclusive { run, may_ship },
            3 => Kind::Data {
                rights: match head.rights {
                    1 => Rights::Shared,
                    2 => Rights::Exclusive,
                    _ => return Err("granted rights that do not exist"),
                },
                acks: word,
                body: has_body,
                run,
            },
            4 => Kind::Invalidate { requester: requester()? },
            5 => Kind::Ack,
            6 => Kind::ForwardShared { requester: requester()? },
            7 => Kind::ForwardExclusive { requester: requester()? },
            8 => Kind::Writeback { body: has_body },
            9 => Kind::PutShared,
            10 => Kind::PutExclusive,
            11 => Kind::PutAck,
            12 => Kind::Discard { run: discarded()? },
            13 => Kind::Reclaim,
            14 => Kind::Discarded { run: discarded()? },
            15 => Kind::Load,
            16 => Kind::LoadAt { requester: requester()? },
            17 => Kind::Loaded { body: has_body },
            18 => Kind::Store,
            19 => Kind::Stored { done: word == 1 },
            20 => Kind::Ship,
            21 => {
                let (token, operation) = Asked::read(more)?;
                Kind::Operate { token, operation }
            }
            22 => {
                let (token, operation) = Asked::read(more)?;
                Kind::OperateAt { requester: requester()?, token, operation }
            }
            23 => {
                let (token, old) = Answered::read(more, word == 1)?;
                Kind::Operated { token, old }
            }
            24 => Kind::Push,
            25 => Kind::Pushed { taken: word == 1 },
            _ => return Err("sent a coherence message of an unknown kind"),
        };
        if kind.has_body() != has_body {
            return Err("sent a coherence message with a body it must not have, or without the one it needs");
        }
        let message = Message { page: Page(head.page.get()), kind };
        // One message has one form: what is not used is zero.
        if message.head(body == Body::Zero).as_bytes() != &frame[..FIXED + more.len()] {
            return Err("sent a coherence frame with reserved bits set");
        }
        Ok((message, body))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::message::tests::kinds;
    use super::super::operation::tests::operations;
    use super::*;

    proptest! {
        #[test]
        fn a_frame_reads_back_as_what_was_written(kind in kinds(9), page in 0u64..900, zero: bool) {
            let message = Message { page: Page(page), kind };
            let mut frame = message.head(zero).as_bytes().to_vec();
            if kind.has_body() && !zero {
                frame.extend([7; PAGE_SIZE]);
            }
            let (back, body) = Message::parse(&frame, 9, 1000).unwrap();
            prop_assert_eq!(back, message);
            prop_assert_eq!(body != Body::Absent, kind.has_body());
            prop_assert!(Message::parse(&frame, 9, page).is_err());
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(frame in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Message::parse(&frame, 9, 1000);
        }

        #[test]
        fn a_damaged_frame_is_refused_or_means_what_it_now_says(
            kind in kinds(9), page in 0u64..900, zero: bool, at in 0usize..LONGEST, value: u8
        ) {
            let mut frame = Message { page: Page(page), kind }.head(zero).as_bytes().to_vec();
            let at = at % frame.len();
            if kind.has_body() && !zero {
                frame.extend([7; PAGE_SIZE]);
            }
            frame[at] = value;
            if let Ok((message, body)) = Message::parse(&frame, 9, 1000) {
                let again = message.head(body == Body::Zero);
                let len = again.as_bytes().len();
                prop_assert_eq!(again.as_bytes(), &frame[..len]);
                prop_assert!(message.page.0 < 1000);
                prop_assert_eq!(matches!(body, Body::Bytes(_)), frame.len() > len);
            }
        }

        #[test]
        fn a_frame_cut_short_or_too_long_is_refused(kind in kinds(9), cut in 1usize..LONGEST) {
            let message = Message { page: Page(1), kind };
            let mut frame = message.head(true).as_bytes().to_vec();
            frame.truncate(frame.len() - cut.min(frame.len()));
            prop_assert!(Message::parse(&frame, 9, 1000).is_err());
            let mut frame = message.head(true).as_bytes().to_vec();
            frame.push(0);
            prop_assert!(Message::parse(&frame, 9, 1000).is_err());
        }

        #[test]
        fn an_operation_and_its_answer_fit_in_64_bytes(token: u32, operation in operations(), old: u128) {
            for kind in [
                Kind::Operate { token, operation },
                Kind::OperateAt { requester: NodeId(8), token, operation },
                Kind::Operated { token, old: Some(old.into()) },
                Kind::Operated { token, old: None },
            ] {
                let message = Message { page: Page(999), kind };
                let head = message.head(false);
                prop_assert!(head.as_bytes().len() <= 64);
                prop_assert_eq!(Message::parse(head.as_bytes(), 9, 1000).unwrap(), (message, Body::Absent));
            }
        }
    }
}
