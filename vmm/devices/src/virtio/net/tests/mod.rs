//! A card as its driver sees it: packets both ways, several queues, and merged buffers.

mod limited;

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::virtio::testing::{DATA, Driver};
use proptest::prelude::*;

const MERGE: u64 = 1 << net::VIRTIO_NET_F_MRG_RXBUF;
const SEVERAL: u64 = 1 << net::VIRTIO_NET_F_MQ | 1 << net::VIRTIO_NET_F_CTRL_VQ;

/// A port whose other ends a test holds.
struct Sockets {
    files: Vec<UnixDatagram>,
    attached: Mutex<Vec<(u16, bool)>>,
}

impl Port for Sockets {
    fn file(&self, pair: u16) -> BorrowedFd<'_> {
        self.files[usize::from(pair)].as_fd()
    }
    fn set_offloads(&self, _: bool, _: bool, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn attach(&self, pair: u16, attached: bool) -> io::Result<()> {
        self.attached.lock().unwrap().push((pair, attached));
        Ok(())
    }
}

struct Card {
    driver: Driver,
    port: Arc<Sockets>,
    ends: Vec<UnixDatagram>,
}

fn card(pairs: u16, features: u64) -> Card {
    let (mut files, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        files.push(ours);
        ends.push(theirs);
    }
    let port = Arc::new(Sockets { files, attached: Mutex::default() });
    let mut driver = Driver::new(Box::new(Net::new(port.clone(), pairs, [2, 0, 0, 0, 0, 7])));
    driver.start(features);
    Card { driver, port, ends }
}

/// A header and `len` bytes, byte n being n.
fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..len).map(|n| n as u8));
    packet
}

#[test]
fn the_registers_have_address_link_and_pairs() {
    let card = card(2, MERGE);
    let bytes = card.driver.read_bytes(0x2000, 12);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 7, 1, 0, 2, 0, 0, 0]);
}

#[test]
fn packets_leave_the_guest_whole_however_they_are_scattered() {
    let mut card = card(1, MERGE);
    let sent = packet(1500);
    card.driver.put(DATA, &sent[..5]);
    card.driver.put(DATA + 0x1000, &sent[5..]);
    card.driver.request(1, &[(DATA, 5, false), (DATA + 0x1000, sent.len() as u32 - 5, false)]);
    let mut seen = [0; 4096];
    let len = card.ends[0].recv(&mut seen).unwrap();
    assert_eq!(seen[..len], sent);
}

#[test]
fn a_packet_without_content_is_given_back_and_goes_nowhere() {
    let mut card = card(1, MERGE);
    assert_eq!(card.driver.request(1, &[(DATA, HEADER as u32, false)]), 0);
    let sent = packet(60);
    card.driver.put(DATA, &sent);
    card.driver.request(1, &[(DATA, 72, false)]);
    let mut seen = [0; 4096];
    assert_eq!(card.ends[0].recv(&mut seen).unwrap(), 72);
}

#[test]
fn a_packet_fills_as_many_buffers_as_it_takes() {
    let mut card = card(1, MERGE);
    for index in 0..4u16 {
        let at = DATA + u64::from(index) * 0x1000;
        card.driver.descriptor(crate::virtio::testing::rings(0)[0], index, at, 1000, 2, 0);
        card.driver.offer(0, index);
    }
    let sent = packet(2500);
    card.ends[0].send(&sent).unwrap();
    let given: Vec<_> = (0..3).map(|_| card.driver.wait(0)).collect();
    assert_eq!(given, [(0, 1000), (1, 1000), (2, 512)]);
    let mut seen = card.driver.get(DATA, 1000);
    assert_eq!(seen[10..12], [3, 0], "the number of buffers");
    seen[10] = 0;
    seen.extend(card.driver.get(DATA + 0x1000, 1000));
    seen.extend(card.driver.get(DATA + 0x2000, 512));
    assert_eq!(seen, sent);
}

#[test]
fn a_packet_waits_for_the_drivers_buffers() {
    let mut card = card(1, MERGE);
    card.ends[0].send(&packet(100)).unwrap();
    card.driver.descriptor(crate::virtio::testing::rings(0)[0], 0, DATA, 2000, 2, 0);
    card.driver.offer(0, 0);
    assert_eq!(card.driver.wait(0), (0, 112));
}

#[test]
fn a_packet_that_does_not_fit_is_lost_and_the_next_comes() {
    let mut card = card(1, 0);
    card.ends[0].send(&packet(3000)).unwrap();
    card.ends[0].send(&packet(100)).unwrap();
    for head in 0..2 {
        card.driver.descriptor(crate::virtio::testing::rings(0)[0], head, DATA, 2000, 2, 0);
        card.driver.offer(0, head);
    }
    assert_eq!(card.driver.wait(0), (0, 0));
    assert_eq!(card.driver.wait(0), (1, 112));
}

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let mut card = card(3, MERGE | SEVERAL);
    let take = |port: &Sockets| std::mem::take(&mut *port.attached.lock().unwrap());
    assert_eq!(take(&card.port), [(1, false), (2, false)]);
    for (pairs, answer) in [(2u8, 0u8), (0, 1), (4, 1), (3, 0)] {
        card.driver.put(DATA, &[4, 0, pairs, 0, 0xee]);
        assert_eq!(card.driver.request(6, &[(DATA, 4, false), (DATA + 4, 1, true)]), 1);
        assert_eq!(card.driver.get(DATA + 4, 1), [answer], "{pairs} pairs");
    }
    assert_eq!(take(&card.port), [(1, true), (2, false), (1, true), (2, true)]);
    card.driver.put(DATA, &packet(64));
    card.driver.request(5, &[(DATA, 76, false)]);
    assert_eq!(card.ends[2].recv(&mut [0; 100]).unwrap(), 76);
}

#[test]
fn a_reset_ends_threads_that_wait_for_packets() {
    let mut card = card(2, MERGE | SEVERAL);
    for _ in 0..3 {
        card.driver.reset();
        card.driver.start(MERGE | SEVERAL);
    }
    card.driver.put(DATA, &packet(64));
    card.driver.request(1, &[(DATA, 76, false)]);
    assert_eq!(card.ends[0].recv(&mut [0; 100]).unwrap(), 76);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn whatever_the_driver_offers_a_reset_brings_the_card_back(
        offers in proptest::collection::vec((0u16..5, prop_oneof![0u64..0x10_1000, any::<u64>()], prop_oneof![0u32..5000, any::<u32>()], 0u16..8, 0u16..20), 1..20),
        packets in proptest::collection::vec(1usize..3000, 0..4),
    ) {
        let mut card = card(2, MERGE | SEVERAL);
        for len in packets {
            card.ends[0].send(&packet(len)).unwrap();
        }
        for (queue, gpa, len, flags, next) in offers {
            let table = crate::virtio::testing::rings(queue)[0];
            card.driver.descriptor(table, next % 16, gpa, len, flags, next);
            card.driver.offer(queue, next % 16);
        }
        card.driver.reset();
        card.driver.start(MERGE | SEVERAL);
        card.driver.put(DATA, &packet(64));
        card.driver.request(1, &[(DATA, 76, false)]);
    }
}
