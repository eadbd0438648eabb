//! Makes and connects queue pairs in the place of those that failed, on a thread of its own: that takes milliseconds, and
//! a second where the network is cut.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::notes::Hello;
use super::place::{Half, Place};
use super::verbs::queue::Qp;
use crate::{FabricError, NodeId};

/// The pause before a connection is made again, and between attempts at it.
const PAUSE: Duration = Duration::from_secs(1);

/// Sends work to the thread, which ends with the last of these.
#[derive(Clone)]
pub(super) struct Mender {
    place: Arc<Place>,
    jobs: Sender<Job>,
}

/// For which connection something is done: to which peer, and the how-manieth to it.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct Which {
    pub(super) peer: NodeId,
    pub(super) number: u64,
}

struct Job {
    lane: Weak<Lane>,
    which: Which,
    what: What,
}

enum What {
    /// Make a queue pair at that time, after this one is gone.
    Make(Instant, Option<Qp>),
    Connect(Half, Hello),
}

/// What was done.
pub(super) enum Done {
    /// A queue pair was made.
    Made(Which, Half),
    /// It was connected, or why not, as the end of a sentence about the peer.
    Connected(Which, Result<Qp, String>),
}

impl Mender {
    /// Starts the thread.
    pub(super) fn start(place: Arc<Place>) -> Result<Mender, FabricError> {
        let (jobs, queue) = channel();
        let here = place.clone();
        std::thread::Builder::new()
            .name("rdma mender".into())
            .spawn(move || work(&here, &queue))
            .map_err(|source| FabricError::Io { what: "starting the thread that mends RDMA", source })?;
        Ok(Mender { place, jobs })
    }

    /// Has a queue pair made for `lane` in place of another one, after a pause and when the port is active.
    pub(super) fn make(&self, lane: &Arc<Lane>, which: Which, old: Option<Qp>) {
        self.send(lane, which, What::Make(Instant::now() + PAUSE, old));
    }

    /// How a peer reaches a queue pair that was made.
    pub(super) fn hello(&self, half: &Half) -> Hello {
        half.hello(&self.place)
    }

    /// Has it connected to the one of `hello`. Nothing but it uses the peer's receive slots meanwhile.
    pub(super) fn connect(&self, lane: &Arc<Lane>, which: Which, half: Half, hello: Hello) {
        self.send(lane, which, What::Connect(half, hello));
    }

    fn send(&self, lane: &Arc<Lane>, which: Which, what: What) {
        // The thread ends only when nobody can send to it.
        let _ = self.jobs.send(Job { lane: Arc::downgrade(lane), which, what });
    }
}

fn work(place: &Place, queue: &Receiver<Job>) {
    let mut waiting: Vec<Job> = Vec::new();
    loop {
        let due = waiting.iter().filter_map(Job::due).min();
        let job = match due {
            Some(due) => queue.recv_timeout(due.saturating_duration_since(Instant::now())),
            None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match job {
            Ok(job) => waiting.push(job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        let (ready, later) =
            waiting.into_iter().partition::<Vec<Job>, _>(|job| job.due().is_none_or(|due| due <= now));
        waiting = later;
        waiting.extend(ready.into_iter().filter_map(|job| job.run(place)));
    }
}

impl Job {
    /// When it is to be done, if not at once.
    fn due(&self) -> Option<Instant> {
        match self.what {
            What::Make(due, _) => Some(due),
            What::Connect(..) => None,
        }
    }

    /// Does it; the job again if it has to be tried later.
    fn run(self, place: &Place) -> Option<Job> {
        let lane = self.lane.upgrade()?;
        let Job { which, .. } = self;
        match self.what {
            What::Make(_, old) => {
                drop(old);
                match make(place, &lane) {
                    Ok(half) => lane.done(Done::Made(which, half)),
                    Err(why) => {
                        tracing::debug!("RDMA to {} waits: {why}", which.peer);
                        return Some(Job {
                            lane: self.lane,
                            which,
                            what: What::Make(Instant::now() + PAUSE, None),
                        });
                    }
                }
            }
            What::Connect(half, hello) => {
                let place_of_peer = lane.place_of(which.peer);
                // SAFETY: the caller's promise to `Mender::connect`; the slots live as long as the lane.
                let qp = unsafe { half.connect(place, &hello, &lane.receive_slots, place_of_peer) };
                lane.done(Done::Connected(which, qp));
            }
        }
        None
    }
}

fn make(place: &Place, lane: &Lane) -> Result<Half, String> {
    let port = place.look()?;
    Half::new(place, port, &lane.pd, (&lane.send_cq, &lane.receive_cq))
        .map_err(|error| format!("a queue pair cannot be had ({error})"))
}
