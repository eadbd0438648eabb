//! The cost of one look for news: asking epoll, or trying every socket.
//!
//! The TCP receiver does the second for few peers and the first for many; this shows where the border is.
//! Run it with `cargo run --release -p fabric --example poll_cost`. Each line is for one number of peers:
//! nanoseconds for a look that finds nothing, and for one that finds a 64-byte frame at one peer.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};

const ROUNDS: u32 = 20_000;

/// Connected pairs: the far ends send, the near ends receive.
fn pairs(n: usize) -> std::io::Result<Vec<(TcpStream, TcpStream)>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    (0..n)
        .map(|_| {
            let far = TcpStream::connect(listener.local_addr()?)?;
            far.set_nodelay(true)?;
            Ok((far, listener.accept()?.0))
        })
        .collect()
}

/// Median of the time of one `look`; `before` is not counted.
fn median(mut before: impl FnMut(u32), mut look: impl FnMut() -> usize, expected: usize) -> Duration {
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|round| {
            before(round);
            let began = Instant::now();
            let found = look();
            let took = began.elapsed();
            assert_eq!(found, expected, "loopback delivers before send returns");
            took
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("peers  nothing: epoll  direct   one frame: epoll  direct   (ns, medians of {ROUNDS})");
    for peers in [1, 2, 3, 4, 8, 16] {
        let pairs = pairs(peers)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (i, (_, near)) in pairs.iter().enumerate() {
            epoll.add(near, EpollEvent::new(EpollFlags::EPOLLIN, i as u64))?;
        }
        let mut buffer = vec![0; 256 * 1024];
        let mut events = [EpollEvent::empty(); 64];
        let mut take =
            |i: usize| recv(pairs[i].1.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
        let send = |round: u32| (&pairs[round as usize % peers].0).write_all(&[1; 64]).expect("loopback");

        let mut by_epoll = |take: &mut dyn FnMut(usize) -> usize| {
            let ready = epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            events[..ready].iter().map(|event| take(event.data() as usize)).sum()
        };
        let directly = |take: &mut dyn FnMut(usize) -> usize| (0..peers).map(take).sum();

        let idle = (median(|_| (), || by_epoll(&mut take), 0), median(|_| (), || directly(&mut take), 0));
        let busy = (median(send, || by_epoll(&mut take), 64), median(send, || directly(&mut take), 64));
        println!(
            "{peers:5}  {:14}  {:6}   {:16}  {:6}",
            idle.0.as_nanos(),
            idle.1.as_nanos(),
            busy.0.as_nanos(),
            busy.1.as_nanos()
        );
    }
    Ok(())
}
