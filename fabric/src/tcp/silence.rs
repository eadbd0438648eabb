//! Silence of a connection: a peer that acknowledges nothing any more is lost, unlike one that has no room
//! for more.
//!
//! A lane's packets may get lost while all other lanes are fine, and heartbeats of the users above travel on
//! one lane only. The kernel would go on sending for a quarter of an hour. Its own limit (TCP_USER_TIMEOUT)
//! also ends a connection whose peer answers every probe and has no room: a process that is stopped, or so
//! busy that it reads nothing for a while. So that limit is a long one ([`super::sockets::tune`]), and a
//! thread looks at all connections now and then:
//!
//! | state | dead when |
//! |---|---|
//! | something is in flight, and the peer has room | none of it has been acknowledged for a *silence*: whatever else comes from the peer, what is sent does not get there |
//! | something is in flight, and the peer has no room any more | it was sent twice again, and nothing came for a silence |
//! | nothing is in flight, and two probes are unanswered | nothing came for a silence |
//! | the peer has no room, and answers | never by this rule |
//!
//! One probe is not enough: an answer may be under way, and Linux answers a peer's probes twice a second at
//! most (tcp_invalid_ratelimit). The kernel probes an idle connection every second; where the peer has no room
//! it does so after 0.2 s and then twice as late each time, so that a peer that dies in this state is noticed
//! the later the longer it has taken nothing, at last by the kernel's own limit.

use std::net::TcpStream;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::link::Link;
use super::tcp_info::TcpInfo;
use crate::FabricError;

/// Looks in a silence: so many fit, and the last comes in time.
const LOOKS: u32 = 6;

/// A connection that is looked at.
struct Watched {
    /// Which one; a lane's may be replaced.
    socket: Weak<TcpStream>,
    vigil: Vigil,
}

/// Starts the thread, which ends with the last of the lanes.
pub(super) fn watch(lanes: &[Arc<Lane>], silence: Duration) -> Result<(), FabricError> {
    let lanes: Vec<_> = lanes.iter().map(|lane| (Arc::downgrade(lane), Vec::new())).collect();
    let started = thread::Builder::new().name("silence".into()).spawn(move || run(lanes, silence));
    started
        .map(drop)
        .map_err(|source| FabricError::Io { what: "starting the thread for silent peers", source })
}

fn run(mut lanes: Vec<(Weak<Lane>, Vec<Option<Watched>>)>, silence: Duration) {
    loop {
        thread::sleep(silence / LOOKS);
        lanes.retain_mut(|(lane, watched)| {
            let Some(lane) = lane.upgrade() else { return false };
            watched.resize_with(lane.links().len(), || None);
            for (link, watched) in lane.links().iter().zip(watched) {
                if let Some(link) = link {
                    look(link, watched, silence);
                }
            }
            true
        });
        if lanes.is_empty() {
            return;
        }
    }
}

/// Looks at a link's present connection.
fn look(link: &Link, watched: &mut Option<Watched>, silence: Duration) {
    let Some(socket) = link.socket() else { return *watched = None };
    let Some(info) = TcpInfo::of(&socket) else { return };
    let same = watched.take().filter(|watched| watched.socket.as_ptr() == Arc::as_ptr(&socket));
    let now = Instant::now();
    let mut vigil = same.map_or_else(|| Vigil::new(now), |watched| watched.vigil);
    if vigil.is_dead(&info, silence, now) {
        let why = format!("its host does not answer: it has acknowledged nothing for {silence:.1?}");
        return link.give_up_connection(&socket, why);
    }
    *watched = Some(Watched { socket: Arc::downgrade(&socket), vigil });
}

/// How long what was sent has waited for an acknowledgement.
#[derive(Debug)]
struct Vigil {
    looked: Instant,
    in_flight: bool,
    acked: u64,
    waited: Duration,
}

impl Vigil {
    fn new(now: Instant) -> Vigil {
        Vigil { looked: now, in_flight: false, acked: 0, waited: Duration::ZERO }
    }

    /// Takes a look's result; whether the connection is dead.
    fn is_dead(&mut self, info: &TcpInfo, silence: Duration, now: Instant) -> bool {
        // If this host stood still, that time proves nothing of the peer.
        let passed = now.saturating_duration_since(self.looked).min(2 * silence / LOOKS);
        let waits = info.in_flight && self.in_flight && info.has_room && info.acked == self.acked;
        self.waited = if waits { self.waited + passed } else { Duration::ZERO };
        (self.looked, self.in_flight, self.acked) = (now, info.in_flight, info.acked);
        let asked = if info.in_flight { info.sent_again } else { info.probes };
        let unheard = asked >= 2 && info.heard >= silence && !(info.in_flight && info.has_room);
        self.waited >= silence || unheard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(3);
    const LOOK: Duration = Duration::from_millis(500);
    /// Idle and well.
    const IDLE: TcpInfo = TcpInfo {
        in_flight: false,
        acked: 9,
        sent_again: 0,
        probes: 0,
        has_room: true,
        heard: Duration::ZERO,
    };

    /// After which time in this state a connection is dead, if it is within a minute.
    fn dead_after(state: impl Fn(u64) -> TcpInfo) -> Option<Duration> {
        let mut now = Instant::now();
        let mut vigil = Vigil::new(now);
        assert!(!vigil.is_dead(&IDLE, SILENCE, now));
        let looks = (1..120).find(|n| {
            now += LOOK;
            vigil.is_dead(&state(*n), SILENCE, now)
        });
        looks.map(|looks| looks as u32 * LOOK)
    }

    #[test]
    fn a_peer_is_dead_when_what_was_sent_is_not_acknowledged_whatever_it_sends_itself() {
        // It may have been sent just before it was seen for the first time.
        assert_eq!(dead_after(|_| TcpInfo { in_flight: true, ..IDLE }), Some(SILENCE + LOOK));
        assert_eq!(dead_after(|n| TcpInfo { in_flight: true, acked: n, ..IDLE }), None, "it is slow");
    }

    #[test]
    fn a_peer_without_room_is_alive_as_long_as_it_answers() {
        let full = TcpInfo { has_room: false, ..IDLE };
        assert_eq!(dead_after(|_| full), None);
        assert_eq!(dead_after(|_| TcpInfo { in_flight: true, ..full }), None, "the window shrank");
        let lost = |n| TcpInfo { in_flight: true, sent_again: n as u8, heard: LOOK * n as u32, ..full };
        assert_eq!(dead_after(lost), Some(SILENCE));
        // A look may come between a probe and its answer, and the last probe may be long ago.
        let rare = |n| TcpInfo { probes: u8::from(n % 4 == 0), heard: Duration::from_secs(60), ..full };
        assert_eq!(dead_after(rare), None);
        let silent = |n: u64| TcpInfo { probes: n as u8, heard: LOOK * n as u32, ..full };
        assert_eq!(dead_after(silent), Some(SILENCE));
    }

    #[test]
    fn an_idle_peer_is_dead_when_probes_are_not_answered() {
        let probed = |n: u64| TcpInfo { probes: (n / 2) as u8, heard: LOOK * n as u32, ..IDLE };
        assert_eq!(dead_after(probed), Some(SILENCE));
        assert_eq!(dead_after(|_| IDLE), None);
    }

    #[test]
    fn time_in_which_this_host_stood_still_proves_nothing() {
        let mut now = Instant::now();
        let mut vigil = Vigil::new(now);
        let stuck = TcpInfo { in_flight: true, heard: Duration::from_secs(60), ..IDLE };
        vigil.is_dead(&stuck, SILENCE, now);
        now += Duration::from_secs(60);
        assert!(!vigil.is_dead(&stuck, SILENCE, now));
    }
}
