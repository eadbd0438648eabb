//! Limits and shares of network cards, measured in both directions with a driver and sockets.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::rate_limit::{Limiter, Pool};
use crate::virtio::testing::{DATA, Driver, rings};
use machine::config::limits::Limits;

/// How long one measurement takes.
const ROUND: Duration = Duration::from_millis(500);
/// Bytes of a packet beside its header.
const LEN: usize = 1000;

struct Socket(UnixDatagram);

impl Port for Socket {
    fn file(&self, _: u16) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn set_offloads(&self, _: bool, _: bool, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn attach(&self, _: u16, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A card and the other end of its cable.
struct Card {
    driver: Driver,
    end: UnixDatagram,
}

fn card(receive: &Arc<Limiter>, transmit: &Arc<Limiter>) -> Card {
    let (ours, end) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let card = Net::new(Arc::new(Socket(ours)), 1, [2, 0, 0, 0, 0, 7]);
    let mut driver = Driver::new(Box::new(card.limited(receive.clone(), transmit.clone())));
    driver.start(0);
    Card { driver, end }
}

impl Card {
    /// Packets that leave the guest each second.
    fn sent(&mut self) -> f64 {
        per_second(|| {
            self.driver.request(1, &[(DATA, (HEADER + LEN) as u32, false)]);
            self.end.recv(&mut [0; 2 * LEN]).unwrap();
        })
    }

    /// Packets that reach the guest each second.
    fn received(&mut self) -> f64 {
        per_second(|| {
            self.driver.descriptor(rings(0)[0], 0, DATA, 4096, 2, 0);
            self.driver.offer(0, 0);
            self.end.send(&[0; HEADER + LEN]).unwrap();
            assert_eq!(self.driver.wait(0), (0, (HEADER + LEN) as u32));
        })
    }
}

fn per_second(mut packet: impl FnMut()) -> f64 {
    let (begin, mut done) = (Instant::now(), 0);
    while begin.elapsed() < ROUND {
        packet();
        done += 1;
    }
    f64::from(done) / begin.elapsed().as_secs_f64()
}

/// Whether what `measure` finds is never more than a tenth above `wanted`, and if the host is able to, once
/// not below.
fn expect(what: &str, wanted: f64, able: bool, mut measure: impl FnMut() -> f64) {
    // Uses the burst up.
    measure();
    let rates = [(); 3].map(|()| measure());
    eprintln!("{what}: {rates:.1?} packets each second of {wanted}");
    assert!(rates.iter().all(|rate| *rate < wanted * 1.1), "{what}: {rates:?}");
    if able {
        assert!(rates.iter().any(|rate| *rate > wanted * 0.9), "{what}: {rates:?}");
    } else {
        eprintln!("skipped: whether {wanted} are reached; this host does not do as much without a limit");
    }
}

#[test]
fn limits_hold_within_a_tenth_in_each_direction() {
    let (receive, transmit): (Arc<Limiter>, Arc<Limiter>) = Default::default();
    let mut card = card(&receive, &transmit);
    let (sent, received) = (card.sent(), card.received());
    let limits = Limits { iops: Some(200), bandwidth: None };
    receive.set(limits);
    transmit.set(limits);
    expect("sent, 200 packets", 200.0, sent > 800.0, || card.sent());
    expect("received, 200 packets", 200.0, received > 800.0, || card.received());
    transmit.set(Limits { iops: None, bandwidth: Some(300 * LEN as u64) });
    expect("sent, 300000 bytes", 300.0, sent > 1200.0, || card.sent());
    receive.set(Limits { iops: None, bandwidth: Some(300 * LEN as u64) });
    expect("received, 300000 bytes", 300.0, received > 1200.0, || card.received());
}

#[test]
fn cards_split_what_they_send_by_their_shares() {
    let pool = Pool::new(Limits { iops: Some(400), bandwidth: None }).unwrap();
    let mut cards = [300, 100].map(|share| {
        let transmit = Arc::new(Limiter::new(Limits::default(), Some(pool.join(share))));
        card(&Arc::default(), &transmit)
    });
    let able = card(&Arc::default(), &Arc::default()).sent() > 3200.0;
    let mut rounds = Vec::new();
    for _ in 0..4 {
        let rates: Vec<f64> = std::thread::scope(|scope| {
            let threads: Vec<_> = cards.iter_mut().map(|card| scope.spawn(|| card.sent())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        rounds.push(rates);
    }
    // The first has the burst.
    rounds.remove(0);
    eprintln!("3 to 1: {rounds:.1?} packets each second of 300 and 100");
    assert!(rounds.iter().all(|rates| rates.iter().sum::<f64>() < 440.0), "{rounds:?}");
    if able {
        let near = |rates: &Vec<f64>| (rates[0] - 300.0).abs() < 30.0 && (rates[1] - 100.0).abs() < 10.0;
        assert!(rounds.iter().any(near), "{rounds:?}");
    } else {
        eprintln!("skipped: whether shares are reached; this host does not do as much without a limit");
    }
}
