//! The control queue (5.1.6.5), with one command: how many pairs of queues the driver uses.

use virtio_bindings::virtio_net as net;

use super::Port;
use crate::virtio::chain::Chain;

/// Does a command; how many bytes of the answer were written. `pairs` is how many pairs there are.
pub fn serve(chain: &mut Chain, port: &dyn Port, pairs: u16) -> u32 {
    let mut command = [0; 4];
    let read = chain.readable.read(&mut command);
    let class = (u32::from(command[0]), u32::from(command[1]));
    let wanted = u16::from_le_bytes([command[2], command[3]]);
    let known = class == (net::VIRTIO_NET_CTRL_MQ, net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    let ok = known && read == 4 && (1..=pairs).contains(&wanted) && set_pairs(port, pairs, wanted);
    let answer = if ok { net::VIRTIO_NET_OK } else { net::VIRTIO_NET_ERR };
    chain.writable.write(&[answer as u8]) as u32
}

/// Packets come to the first `wanted` pairs, the first always among them.
fn set_pairs(port: &dyn Port, pairs: u16, wanted: u16) -> bool {
    (1..pairs).all(|pair| match port.attach(pair, pair < wanted) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!("a network card cannot use {wanted} pairs of queues: {error}");
            false
        }
    })
}
