//! The protocol by which a connection that was lost is made again, seen from one side, without any I/O.
//!
//! Both sides end a connection with a goodbye on the session, each with its own, and may begin the next one
//! when both were said. As the session keeps order, what a peer says belongs to the connection after its last
//! goodbye.
//!
//! ```text
//! Up ── lost ──> Asked ── a queue pair is made ──> Made ── the peer's goodbye: hello ──> Greeted
//! ^                ^                                                                        │ the peer's hello
//! │                │                                                                        v
//! │                ├───────────────── it fails, or the peer's goodbye: goodbye ──────── Connecting
//! │                │                                                                        │ connected: ready
//! │                └── lost ──────────────────────────────────────────────────────────┐     v
//! └───────────────────────── the peer's ready: returned ──────────────────────────── Connected
//! ```

use super::super::notes::{Hello, Note};

/// The connection to one peer on one lane.
pub(crate) struct Connection {
    stage: Stage,
    /// The peer has said goodbye: to this connection, once it is installed, or else to the one before it.
    over: bool,
    /// How to reach its new queue pair.
    hello: Option<Hello>,
    /// It has connected that one.
    ready: bool,
}

#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum Stage {
    /// Messages may be sent.
    Up,
    /// There is no queue pair yet.
    Asked,
    /// The peer knows nothing of the queue pair.
    Made,
    /// It does.
    Greeted,
    Connecting,
    /// Messages may come. The peer is not known to take any.
    Connected,
}

/// What is to be done.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// Forget the queue pair, and have another one made after a pause.
    Make,
    /// Tell the peer how to reach the queue pair.
    Hello,
    /// Connect it to the peer's.
    Connect(Hello),
    /// Take messages from it, and tell the peer that it is ready.
    Install,
    /// Messages may be sent.
    Returned,
    /// Tell the peer that this connection is over.
    Goodbye,
}

/// A violation of the protocol: a note that the peer may not send at that place.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) struct Violation;

impl Connection {
    /// A connection that is up.
    pub(crate) fn new() -> Connection {
        Connection { stage: Stage::Up, over: false, hello: None, ready: false }
    }

    /// Whether messages of the peer may come.
    pub(crate) fn is_installed(&self) -> bool {
        matches!(self.stage, Stage::Up | Stage::Connected)
    }

    /// The connection was installed, and was ended with a goodbye.
    pub(crate) fn lost(&mut self) -> Vec<Step> {
        debug_assert!(self.is_installed());
        // The peer may have said goodbye, and be on its way to the next one.
        (self.stage, self.ready) = (Stage::Asked, false);
        vec![Step::Make]
    }

    /// A queue pair was made, and nothing of the one before it is left.
    pub(crate) fn made(&mut self) -> Vec<Step> {
        debug_assert_eq!(self.stage, Stage::Asked);
        self.stage = Stage::Made;
        self.go_on()
    }

    /// It was connected to the peer's, or could not be.
    pub(crate) fn connected(&mut self, done: bool) -> Vec<Step> {
        debug_assert_eq!(self.stage, Stage::Connecting);
        if !done {
            return self.give_up(false);
        }
        (self.stage, self.over, self.hello) = (Stage::Connected, false, None);
        let mut steps = vec![Step::Install];
        steps.append(&mut self.go_on());
        steps
    }

    /// Takes a note.
    pub(crate) fn note(&mut self, note: &Note) -> Result<Vec<Step>, Violation> {
        match (note, self.stage) {
            (Note::Goodbye(_), _) if !self.over => self.over = true,
            // It has seen this side's hello, and gives up what came of that.
            (Note::Goodbye(_), Stage::Greeted | Stage::Connecting) => return Ok(self.give_up(true)),
            (Note::Hello(hello), _) if self.over && self.hello.is_none() => self.hello = Some(*hello),
            (Note::Ready, Stage::Connecting) if self.over && !self.ready => self.ready = true,
            (Note::Ready, Stage::Connected) if !self.over => self.ready = true,
            // It said so before it heard this side's goodbye.
            (Note::Hello(_) | Note::Ready, _) if !self.over && !self.is_installed() => {}
            _ => return Err(Violation),
        }
        Ok(self.go_on())
    }

    fn go_on(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.stage == Stage::Made && self.over {
            self.stage = Stage::Greeted;
            steps.push(Step::Hello);
        }
        if let (Stage::Greeted, Some(hello)) = (self.stage, self.hello) {
            self.stage = Stage::Connecting;
            steps.push(Step::Connect(hello));
        }
        if self.stage == Stage::Connected && self.ready {
            (self.stage, self.ready) = (Stage::Up, false);
            steps.push(Step::Returned);
        }
        steps
    }

    fn give_up(&mut self, over: bool) -> Vec<Step> {
        *self = Connection { stage: Stage::Asked, over, hello: None, ready: false };
        vec![Step::Goodbye, Step::Make]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// One side, with a queue pair that is known by its number.
    struct Side {
        connection: Connection,
        /// Numbers its queue pairs.
        made: u32,
        /// It is to make one, or to connect it to another.
        make: bool,
        connect: Option<u32>,
        /// Whose queue pair its own is connected to.
        other: Option<u32>,
        /// What it has said on the session.
        said: VecDeque<Note>,
        /// Its connection failed, which was not reported yet; or the peer's goodbye came.
        lost: bool,
        goodbye: bool,
        returned: u32,
    }

    fn hello(qpn: u32) -> Hello {
        Hello { link_layer: 2, mtu: 5, qpn, psn: 0, lid: 0, credits: 8, slot: 4352, gid: [0; 16] }
    }

    impl Side {
        fn new() -> Side {
            let (connection, said) = (Connection::new(), VecDeque::new());
            let (made, make, connect, other) = (0, false, None, Some(0));
            Side { connection, made, make, connect, other, said, lost: false, goodbye: false, returned: 0 }
        }

        fn act(&mut self, steps: Vec<Step>) {
            for step in steps {
                match step {
                    Step::Make => (self.make, self.connect, self.other) = (true, None, None),
                    Step::Hello => self.said.push_back(Note::Hello(hello(self.made))),
                    Step::Connect(hello) => self.connect = Some(hello.qpn),
                    Step::Install => {
                        (self.lost, self.goodbye) = (false, false);
                        self.said.push_back(Note::Ready);
                    }
                    Step::Returned => self.returned += 1,
                    Step::Goodbye => self.said.push_back(Note::Goodbye(0)),
                }
            }
        }

        /// The connection fails here.
        fn fail(&mut self) {
            if self.connection.is_installed() && !self.lost {
                self.lost = true;
                self.said.push_back(Note::Goodbye(0));
            }
        }

        /// A loss is reported.
        fn report(&mut self) {
            if self.connection.is_installed() && (self.lost || self.goodbye) {
                self.fail();
                let steps = self.connection.lost();
                self.act(steps);
            }
        }

        fn hear(&mut self, note: Option<Note>) {
            if let Some(note) = note {
                self.goodbye |= matches!(note, Note::Goodbye(_)) && self.connection.is_installed();
                let steps = self.connection.note(&note).expect("the other side keeps to the protocol");
                self.act(steps);
            }
        }

        fn make(&mut self) {
            if std::mem::take(&mut self.make) {
                self.made += 1;
                let steps = self.connection.made();
                self.act(steps);
            }
        }

        fn connect(&mut self, works: bool) {
            if let Some(other) = self.connect.take() {
                self.other = works.then_some(other);
                let steps = self.connection.connected(works);
                self.act(steps);
            }
        }

        fn is_up(&self) -> bool {
            self.connection.stage == Stage::Up && !self.lost && !self.goodbye
        }
    }

    #[test]
    fn both_sides_come_back_after_one_has_noticed_a_loss() {
        let (mut a, mut b) = (Side::new(), Side::new());
        a.fail();
        a.report();
        a.make();
        assert!(a.said.iter().all(|note| *note == Note::Goodbye(0)), "b has not said goodbye yet");
        for _ in 0..5 {
            b.hear(a.said.pop_front());
            b.report();
            b.make();
            b.connect(true);
            a.hear(b.said.pop_front());
            a.connect(true);
        }
        assert!(a.is_up() && b.is_up());
        assert_eq!((a.returned, b.returned, a.other, b.other), (1, 1, Some(1), Some(1)));
    }

    #[test]
    fn notes_out_of_place_are_refused() {
        let mut up = Connection::new();
        assert_eq!(up.note(&Note::Hello(hello(1))), Err(Violation));
        assert_eq!(up.note(&Note::Ready), Err(Violation));
        let mut asked = Connection::new();
        assert_eq!(asked.note(&Note::Goodbye(0)), Ok(Vec::new()));
        assert_eq!(asked.lost(), [Step::Make]);
        assert_eq!(asked.note(&Note::Ready), Err(Violation));
        assert_eq!(asked.note(&Note::Goodbye(0)), Err(Violation));
        assert_eq!(asked.note(&Note::Hello(hello(1))), Ok(Vec::new()));
        assert_eq!(asked.note(&Note::Hello(hello(1))), Err(Violation));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever fails when, on either side: neither says what the other refuses, and once nothing fails
        /// any more both are up, each connected to the queue pair that the other uses.
        #[test]
        fn two_sides_always_meet_again(
            events in prop::collection::vec((0..2usize, 0..6u8), 0..200),
        ) {
            let mut sides = [Side::new(), Side::new()];
            let calm = (0..200).map(|i| (i % 2, [1, 2, 3, 4][i / 2 % 4]));
            for (who, event) in events.into_iter().chain(calm) {
                let note = if event == 2 { sides[1 - who].said.pop_front() } else { None };
                match event {
                    0 => sides[who].fail(),
                    1 => sides[who].report(),
                    2 => sides[who].hear(note),
                    3 => sides[who].make(),
                    4 => sides[who].connect(true),
                    _ => sides[who].connect(false),
                }
            }
            let [a, b] = &sides;
            prop_assert!(a.is_up() && b.is_up());
            // The first connection's queue pairs have number 0.
            prop_assert_eq!((a.other, b.other), (Some(b.made), Some(a.made)));
        }
    }
}
