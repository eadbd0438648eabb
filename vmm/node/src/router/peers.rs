//! The peers: when each was heard last, heartbeats, and losses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use fabric::NodeId;

use super::{LinkFailure, Router};
use crate::node_msg::NodeMsg;

/// How often a node says that it is there.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

const PRESENT: u8 = 0;
const LEFT: u8 = 1;
const LOST: u8 = 2;

/// The other nodes of the machine.
pub struct Peers {
    own: NodeId,
    start: Instant,
    silence: Duration,
    states: Box<[AtomicU8]>,
    /// Milliseconds since `start` at which each was heard last.
    heard: Box<[AtomicU64]>,
    any_lost: AtomicBool,
    failed: AtomicBool,
    on_failure: Box<dyn Fn(LinkFailure) + Send + Sync>,
}

impl Peers {
    /// The peers of node `own` in a machine of `nodes`. One that says nothing for `silence` is lost.
    /// `on_failure` is called once for each lost peer, from whatever thread notices.
    pub fn new(
        own: NodeId,
        nodes: usize,
        silence: Duration,
        on_failure: Box<dyn Fn(LinkFailure) + Send + Sync>,
    ) -> Peers {
        Peers {
            own,
            start: Instant::now(),
            silence: silence.max(2 * HEARTBEAT),
            states: (0..nodes).map(|_| AtomicU8::new(PRESENT)).collect(),
            heard: (0..nodes).map(|_| AtomicU64::new(0)).collect(),
            any_lost: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            on_failure,
        }
    }

    /// Whether `peer` is another node of the machine that is neither lost nor has left.
    pub fn is_present(&self, peer: NodeId) -> bool {
        peer != self.own
            && self.states.get(peer.index()).is_some_and(|state| state.load(Ordering::SeqCst) == PRESENT)
    }

    /// The peers that are there.
    pub fn present(&self) -> impl Iterator<Item = NodeId> {
        (0..self.states.len() as u16).map(NodeId).filter(|peer| self.is_present(*peer))
    }

    /// Whether any peer was lost.
    pub fn any_lost(&self) -> bool {
        self.any_lost.load(Ordering::SeqCst)
    }

    /// `peer` said something.
    pub fn heard(&self, peer: NodeId) {
        if let Some(heard) = self.heard.get(peer.index()) {
            heard.store(self.now(), Ordering::Relaxed);
        }
    }

    /// `peer` ends in good order; what is lost of it from now on is no failure.
    pub fn left(&self, peer: NodeId) {
        self.turn(peer, LEFT);
    }

    /// `peer` is lost; `why` is a clause. Counts once for each peer, and not for one that has left.
    pub fn lost(&self, peer: NodeId, why: &str) {
        if self.turn(peer, LOST) {
            self.any_lost.store(true, Ordering::SeqCst);
            (self.on_failure)(LinkFailure::PeerLost { peer, why: why.to_owned() });
        }
    }

    /// This node's fabric does not work. Counts once.
    pub fn failed(&self, why: &str) {
        if !self.failed.swap(true, Ordering::SeqCst) {
            self.any_lost.store(true, Ordering::SeqCst);
            (self.on_failure)(LinkFailure::Fabric(why.to_owned()));
        }
    }

    fn turn(&self, peer: NodeId, to: u8) -> bool {
        peer != self.own
            && self.states.get(peer.index()).is_some_and(|state| {
                state.compare_exchange(PRESENT, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            })
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Loses those who were silent for too long.
    fn check(&self) {
        let (now, limit) = (self.now(), self.silence.as_millis() as u64);
        for peer in self.present() {
            let heard = self.heard[peer.index()].load(Ordering::Relaxed);
            if now.saturating_sub(heard) > limit {
                let why = format!("it said nothing for {:.1} s", self.silence.as_secs_f32());
                self.lost(peer, &why);
            }
        }
    }

    fn hear_all(&self) {
        self.present().for_each(|peer| self.heard(peer));
    }
}

/// Starts the thread that sends heartbeats and notices silence. It ends when `stop` is dropped or says
/// something.
///
/// # Errors
/// What the operating system says of a new thread.
pub fn spawn_heartbeat(router: Arc<Router>, stop: Receiver<()>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
        let peers = router.peers().clone();
        base::thread::make_urgent();
        peers.hear_all();
        let mut last = Instant::now();
        loop {
            for peer in peers.present() {
                router.send(peer, &NodeMsg::Heartbeat);
            }
            // A node that was itself held up (a stopped process, a suspended host) has heard nobody, and
            // that is not their fault: they get another period to be heard.
            if last.elapsed() > HEARTBEAT + peers.silence / 2 {
                peers.hear_all();
            }
            last = Instant::now();
            peers.check();
            match stop.recv_timeout(HEARTBEAT) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn peers(silence: Duration) -> (Arc<Peers>, Arc<Mutex<Vec<LinkFailure>>>) {
        let failures = Arc::new(Mutex::new(Vec::new()));
        let sink = failures.clone();
        let on_failure = Box::new(move |failure| sink.lock().unwrap().push(failure));
        (Arc::new(Peers::new(NodeId(1), 3, silence, on_failure)), failures)
    }

    #[test]
    fn a_peer_is_lost_once_and_one_that_left_is_not() {
        let (peers, failures) = peers(Duration::from_secs(3));
        peers.left(NodeId(2));
        peers.lost(NodeId(2), "its connection was closed");
        assert!(!peers.any_lost());
        peers.lost(NodeId(0), "its connection was reset");
        peers.lost(NodeId(0), "it said nothing");
        peers.lost(NodeId(1), "it is this node itself");
        peers.lost(NodeId(77), "it does not exist");
        let why = "its connection was reset".to_owned();
        assert_eq!(*failures.lock().unwrap(), [LinkFailure::PeerLost { peer: NodeId(0), why }]);
        assert_eq!(peers.present().count(), 0);
    }

    #[test]
    fn silence_is_noticed_and_named() {
        let (mut peers, failures) = peers(Duration::from_secs(3));
        let inner = Arc::get_mut(&mut peers).unwrap();
        inner.start = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        peers.heard(NodeId(2));
        peers.check();
        let seen = failures.lock().unwrap().clone();
        assert_eq!(seen.len(), 1);
        assert!(seen[0].to_string().starts_with("node 0 was lost: it said nothing for 3.0 s"), "{}", seen[0]);
        assert!(peers.is_present(NodeId(2)));
    }
}
