//! A 64-byte request and a 4 KiB reply, both sides busy-polling: through the fabric over TCP, beside the
//! floor of plain sockets in the same run.
//!
//! Run it with `cargo run --release -p fabric --example round_trip`.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use fabric::tcp::{Listener, MeshConfig, TcpTransport};
use fabric::{NodeId, Receiver, Transport};

const ROUNDS: usize = 50_000;
const REQUEST: usize = 64;
const REPLY: usize = 4096;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let floor = sockets()?;
    let fabric = fabric()?;
    for (name, times) in [("plain sockets", &floor), ("fabric", &fabric)] {
        let at = |share: usize| times[times.len() * share / 1000].as_nanos() as f64 / 1000.0;
        println!("{name:14} p50 {:6.2} us   p99 {:6.2} us", at(500), at(990));
    }
    let ratio = fabric[ROUNDS / 2].as_secs_f64() / floor[ROUNDS / 2].as_secs_f64();
    println!("ratio of the medians: {ratio:.2}");
    Ok(())
}

/// Reads `buffer` full, spinning.
fn spin(mut socket: &TcpStream, buffer: &mut [u8]) -> Result<(), Failure> {
    let mut have = 0;
    while have < buffer.len() {
        match socket.read(&mut buffer[have..]) {
            Ok(0) => return Err("the other side is gone".into()),
            Ok(n) => have += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn sockets() -> Result<Vec<Duration>, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let far = listener.accept()?.0;
    for socket in [&near, &far] {
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
    }
    let server = thread::spawn(move || -> Result<(), Failure> {
        for _ in 0..ROUNDS {
            spin(&far, &mut [0; REQUEST])?;
            (&far).write_all(&[1; REPLY])?;
        }
        Ok(())
    });
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        (&near).write_all(&[2; REQUEST])?;
        spin(&near, &mut [0; REPLY])?;
        times.push(began.elapsed());
    }
    server.join().map_err(|_| "the server panicked")??;
    times.sort();
    Ok(times)
}

fn fabric() -> Result<Vec<Duration>, Failure> {
    let listeners = [Listener::bind("127.0.0.1:0".parse()?)?, Listener::bind("127.0.0.1:0".parse()?)?];
    let addresses = listeners.each_ref().map(Listener::local_addr).to_vec();
    let [near, far] = listeners;
    let mesh = |listener: Listener, node| {
        listener.mesh(MeshConfig {
            node: NodeId(node),
            addresses: addresses.clone(),
            lanes: 1,
            machine: [1; 16],
            version: "bench".to_owned(),
            timeout: Duration::from_secs(10),
        })
    };
    thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<(), Failure> {
            let (transport, mut receiver) = open(mesh(far, 1)?)?;
            for _ in 0..ROUNDS {
                receive(&mut *receiver)?;
                transport.send(NodeId(0), 0, &[&[1; 16], &[1; REPLY - 16]])?;
            }
            Ok(())
        });
        let (transport, mut receiver) = open(mesh(near, 0)?)?;
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let began = Instant::now();
            transport.send(NodeId(1), 0, &[&[2; REQUEST]])?;
            receive(&mut *receiver)?;
            times.push(began.elapsed());
        }
        server.join().map_err(|_| "the server panicked")??;
        times.sort();
        Ok(times)
    })
}

fn open(transport: TcpTransport) -> Result<(TcpTransport, Box<dyn Receiver>), Failure> {
    let receiver = transport.take_receiver(0).ok_or("lane 0 is missing")?;
    Ok((transport, receiver))
}

fn receive(receiver: &mut dyn Receiver) -> Result<(), Failure> {
    while receiver.poll(&mut |_, _| ())? == 0 {}
    Ok(())
}
