//! The bodies of the fuzz targets in `tests/fuzz`, and of the property tests: each kind of device, and a
//! driver that may do anything to it ([`super::testing::hostile`]). Only memory, sockets and a file in memory
//! are behind the devices. Built for tests only.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::virtio_net as net;

use super::balloon::Balloon;
use super::block::{Access, Block, BlockConfig, Disk, MemoryDisk, RawDisk};
use super::console::{Console, Port as HostPort};
use super::entropy::Entropy;
use super::net::{Net, Port};
use super::testing::DATA;
use super::testing::hostile::{Input, drive};

/// Bytes of a disk.
const DISK: u64 = 64 << 10;
/// Pairs of queues of a network card.
const PAIRS: u16 = 2;

/// A disk: raw, read-only, or in memory.
pub fn block(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let file = File::from(memfd_create(c"disk", MFdFlags::empty()).expect("a file in memory"));
    file.set_len(DISK).expect("it can grow");
    file.write_all_at(&[7; 512], 0).expect("it can be written");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let readonly = kind % 3 == 1;
    let disk: Arc<dyn Disk> = match kind % 3 {
        0 | 1 => {
            Arc::new(RawDisk::open(&path, Access { readonly, unlocked: false }).expect("it can be opened"))
        }
        _ => Arc::new(MemoryDisk(vec![7; DISK as usize])),
    };
    let config = BlockConfig { name: "disk".into(), serial: "serial".into(), readonly, queues: 2 };
    // What happens to its file.
    let outside = |input: &mut Input| {
        let _ = file.set_len(u64::from(input.byte()) * 512);
    };
    drive(Box::new(Block::new(disk, config)), input, outside, 0, |driver| {
        file.set_len(DISK).expect("it can grow");
        let (header, status) = (DATA, DATA + 0x100);
        driver.put(header, &[0; 16]);
        driver.put(status, &[0xee]);
        driver.request(1, &[(header, 16, false), (DATA + 0x1000, 512, true), (status, 1, true)]);
        assert_eq!(driver.get(status, 1), [0], "a correct read fails");
    });
}

struct Sockets(Vec<UnixDatagram>);

impl Port for Sockets {
    fn file(&self, pair: u16) -> BorrowedFd<'_> {
        self.0[usize::from(pair)].as_fd()
    }
    fn set_offloads(&self, _: bool, _: bool, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn attach(&self, pair: u16, _: bool) -> io::Result<()> {
        // As the system would answer for one that it does not know.
        if pair < PAIRS { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// A network card.
pub fn network(data: &[u8]) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (near, far) = UnixDatagram::pair().expect("a pair of sockets");
        for end in [&near, &far] {
            end.set_nonblocking(true).expect("sockets can be told not to block");
        }
        ours.push(near);
        theirs.push(far);
    }
    let card = Net::new(Arc::new(Sockets(ours)), PAIRS, [2, 0, 0, 0, 0, 7]);
    // Packets that come: lost when there is no room.
    let outside = |input: &mut Input| {
        let (to, len) = (usize::from(input.byte()) % theirs.len(), usize::from(input.byte()) * 16);
        let _ = theirs[to].send(&vec![0x55; len]);
    };
    let features = 1 << net::VIRTIO_NET_F_MRG_RXBUF;
    drive(Box::new(card), Input(data), outside, features, |driver| {
        while theirs[0].recv(&mut [0; 64]).is_ok() {}
        driver.request(1, &[(DATA, 76, false)]);
        assert_eq!(theirs[0].recv(&mut [0; 100]).ok(), Some(76), "a correct packet is lost");
    });
}

/// The entropy device.
pub fn entropy(data: &[u8]) {
    drive(
        Box::new(Entropy),
        Input(data),
        |_| {},
        0,
        |driver| {
            assert_eq!(driver.request(0, &[(DATA, 64, true)]), 64);
        },
    );
}

/// A console, or a channel.
pub fn console(data: &[u8]) {
    let mut input = Input(data);
    let named = input.byte().is_multiple_of(2);
    // Nowhere in the file system: an abstract address of this process, which tells its users apart by number.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("gestalt-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    let listener = UnixListener::bind_addr(&address).expect("a new name");
    let port = HostPort::listening(listener).expect("the listener can be told not to block");
    let device = if named { Console::channel(port, "name") } else { Console::terminal(port) };
    // Programs come, write, read and go.
    let mut stream: Option<UnixStream> = None;
    let outside = |input: &mut Input| match input.byte() % 4 {
        0 => stream = None,
        1 => {
            stream = UnixStream::connect_addr(&address).ok();
            stream.iter().for_each(|stream| stream.set_nonblocking(true).expect("it can be told"));
        }
        2 => drop(stream.as_ref().map(|mut stream| stream.write(&[0x55; 300]))),
        _ => drop(stream.as_ref().map(|mut stream| stream.read(&mut [0; 300]))),
    };
    let features = if named { 1 << 1 } else { 0 };
    drive(Box::new(device), input, outside, features, |driver| {
        driver.request(if named { 5 } else { 1 }, &[(DATA, 100, false)]);
    });
}

/// A balloon.
pub fn balloon(data: &[u8]) {
    drive(
        Box::new(Balloon::new(1 << 20)),
        Input(data),
        |_| {},
        0,
        |driver| {
            driver.request(2, &[(DATA, 4096, true)]);
        },
    );
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn whatever_a_driver_does_to_a_disk_a_reset_brings_it_back(data in vec(any::<u8>(), 0..600)) {
            block(&data);
        }

        #[test]
        fn whatever_a_driver_does_to_a_network_card_a_reset_brings_it_back(data in vec(any::<u8>(), 0..600)) {
            network(&data);
        }

        #[test]
        fn whatever_a_driver_does_to_the_entropy_device_a_reset_brings_it_back(data in vec(any::<u8>(), 0..600)) {
            entropy(&data);
        }

        #[test]
        fn whatever_a_driver_does_to_a_console_a_reset_brings_it_back(data in vec(any::<u8>(), 0..600)) {
            console(&data);
        }

        #[test]
        fn whatever_a_driver_does_to_a_balloon_a_reset_brings_it_back(data in vec(any::<u8>(), 0..600)) {
            balloon(&data);
        }
    }
}
