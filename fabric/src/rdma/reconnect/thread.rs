//! The thread that makes and connects queue pairs in the place of those that failed.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::super::notes::Hello;
use super::super::port::Port;
use super::super::unconnected::UnconnectedQp;
use super::super::verbs::queue::{Qp, Queues, Remains};
use super::super::verbs::receive::Share;
use super::{ConnectionId, Outcome, Outcomes};
use crate::FabricError;

/// The pause before a connection is made again, and between attempts at it.
const PAUSE: Duration = Duration::from_secs(1);

/// A rail's thread, which ends with the last of these.
#[derive(Clone)]
pub(crate) struct ReconnectThread {
    port: Arc<Port>,
    jobs: Sender<Job>,
}

/// One piece of work. It owns all that it needs: if nobody waits for its outcome any more, it is dropped.
struct Job {
    id: ConnectionId,
    queues: Queues,
    outcomes: Weak<Outcomes>,
    work: Work,
}

enum Work {
    /// Make a queue pair at that time, after this one is destroyed.
    Make(Instant, Option<Qp>, Remains),
    Connect(UnconnectedQp, Share, Hello),
}

impl ReconnectThread {
    /// Starts the thread.
    pub(crate) fn start(port: Arc<Port>) -> Result<ReconnectThread, FabricError> {
        let (jobs, queue) = channel();
        let here = port.clone();
        std::thread::Builder::new()
            .name("rdma reconnect".into())
            .spawn(move || work(&here, &queue))
            .map_err(|source| FabricError::Io { what: "starting the thread that reconnects RDMA", source })?;
        Ok(ReconnectThread { port, jobs })
    }

    /// Has a queue pair made in place of `old`, after a pause and when the port is active.
    pub(super) fn make(&self, id: ConnectionId, queues: &Queues, outcomes: &Arc<Outcomes>, old: Option<Qp>) {
        self.send(id, queues, outcomes, Work::Make(Instant::now() + PAUSE, old, Remains::default()));
    }

    /// Tells a peer how to reach a queue pair that was made.
    pub(super) fn hello(&self, qp: &UnconnectedQp) -> Hello {
        qp.hello(&self.port.window)
    }

    /// Has it connected to the one of `hello`.
    pub(super) fn connect(
        &self,
        id: ConnectionId,
        queues: &Queues,
        outcomes: &Arc<Outcomes>,
        (qp, share, hello): (UnconnectedQp, Share, Hello),
    ) {
        self.send(id, queues, outcomes, Work::Connect(qp, share, hello));
    }

    fn send(&self, id: ConnectionId, queues: &Queues, outcomes: &Arc<Outcomes>, work: Work) {
        let (queues, outcomes) = (queues.clone(), Arc::downgrade(outcomes));
        // The thread ends only when nobody can send to it.
        let _ = self.jobs.send(Job { id, queues, outcomes, work });
    }
}

fn work(port: &Port, queue: &Receiver<Job>) {
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
        waiting.extend(ready.into_iter().filter_map(|job| job.run(port)));
    }
}

impl Job {
    /// When it is to be done, if not at once.
    fn due(&self) -> Option<Instant> {
        match self.work {
            Work::Make(due, ..) => Some(due),
            Work::Connect(..) => None,
        }
    }

    /// Does it; the job again if it has to be tried later.
    fn run(self, port: &Port) -> Option<Job> {
        let Job { id, queues, outcomes, work } = self;
        let told = outcomes.upgrade()?;
        match work {
            Work::Make(_, old, remains) => {
                let remains = old.map_or(remains, Qp::destroy);
                match make(port, &queues, id) {
                    Ok(qp) => told.push(Outcome::Made(id, qp, remains)),
                    Err(why) => {
                        tracing::debug!("RDMA to {} waits: {why}", id.peer);
                        let work = Work::Make(Instant::now() + PAUSE, None, remains);
                        return Some(Job { id, queues, outcomes, work });
                    }
                }
            }
            Work::Connect(qp, share, hello) => {
                told.push(Outcome::Connected(id, qp.connect(port, &hello, share)));
            }
        }
        None
    }
}

fn make(port: &Port, queues: &Queues, id: ConnectionId) -> Result<UnconnectedQp, String> {
    let state = port.state()?;
    UnconnectedQp::new(queues, &port.window, state, id.peer)
        .map_err(|error| format!("a queue pair cannot be had ({error})"))
}
