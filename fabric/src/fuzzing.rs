//! The entry points of the fuzz targets in `tests/fuzz`: the parts that see a stranger's bytes. Built for
//! them only.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};

pub use crate::rails::fuzz as rails;
pub use crate::rdma::{fuzz_note as rdma_note, fuzz_stream as rdma_stream};
pub use crate::tcp::fuzzing::{frames, greeting, handshake, session};

/// A connected pair of sockets: who sends to us, and us.
pub(crate) fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let near = TcpStream::connect(listener.local_addr().expect("it is bound")).expect("it listens");
    (near, listener.accept().expect("it was called").0)
}

/// Sends all of `bytes`, and that there are no more.
pub(crate) fn pour(mut socket: &TcpStream, bytes: &[u8]) {
    socket.write_all(bytes).expect("so few bytes fit");
    socket.shutdown(Shutdown::Write).expect("it is connected");
}
