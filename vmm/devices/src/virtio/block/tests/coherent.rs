//! A disk on one node and its driver on another: both reach the same memory through the engines of their
//! nodes.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coherence::page::{Homes, PAGE_SIZE};
use coherence::testing::{Builder, Cluster, can_run};
use fabric::sim::SimTransport;
use fabric::{FabricError, LaneId, NodeId, Receiver, Transport, TransportStats};
use firmware::{Layout, MachineSpec, NodeSpec};
use virtio_bindings::virtio_blk as blk;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{Access, Block, BlockConfig, RawDisk};
use crate::virtio::GuestRam;
use crate::virtio::chain::Buffers;
use crate::virtio::testing::{DATA, Driver};

/// Bytes of one request.
const LEN: u32 = 64 << 10;
/// Where requests' data are: two buffers, one of whole pages.
const BUFFERS: [u64; 2] = [DATA + 0x1_0000, DATA + 0x4_0200];
/// How long each arrangement is exercised.
const FOR: Duration = Duration::from_secs(2);

/// A transport that notes where in memory the pages are that it is given.
struct Watched {
    inner: SimTransport,
    pages: Arc<Mutex<Vec<usize>>>,
}

impl Transport for Watched {
    fn node(&self) -> NodeId {
        self.inner.node()
    }
    fn nodes(&self) -> usize {
        self.inner.nodes()
    }
    fn lanes(&self) -> usize {
        self.inner.lanes()
    }
    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let pages = parts.iter().filter(|part| part.len() == PAGE_SIZE);
        base::lock(&self.pages).extend(pages.map(|page| page.as_ptr() as usize));
        self.inner.send(to, lane, parts)
    }
    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        self.inner.take_receiver(lane)
    }
    fn stats(&self) -> TransportStats {
        self.inner.stats()
    }
}

/// Two nodes' views of one memory, with the engines that keep them the same.
struct Nodes {
    views: Vec<GuestRam>,
    cluster: Cluster,
    /// Where the pages were that each has sent.
    sent: Vec<Arc<Mutex<Vec<usize>>>>,
}

impl Nodes {
    fn start() -> Nodes {
        let node = |name: &str| NodeSpec { name: name.into(), cpus: 1, memory: 128 << 20 };
        let spec = MachineSpec { nodes: vec![node("n0"), node("n1")], distances: vec![], pci: true };
        let layout = Layout::new(&spec, firmware::acpi::size_bound(&spec)).unwrap();
        let homes = Homes::new(layout.home_ranges().iter().map(|range| range.end - range.start));
        let sent: Vec<Arc<Mutex<Vec<usize>>>> = vec![Arc::default(), Arc::default()];
        let watched = fabric::sim::cluster(2, 1).unwrap().into_iter().zip(&sent);
        let watched = watched.map(|(inner, pages)| Arc::new(Watched { inner, pages: pages.clone() }) as _);
        let cluster = Builder::new(homes).fatal().start_over(watched).unwrap();
        let view = |node| GuestRam::new(cluster.memory(node), cluster.engine(node), &layout).unwrap();
        Nodes { views: vec![view(0), view(1)], cluster, sent }
    }
}

fn content(round: u64) -> Vec<u8> {
    let mut seed = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(LEN as usize);
    while bytes.len() < LEN as usize {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend(seed.to_le_bytes());
    }
    bytes
}

#[test]
fn what_a_device_stores_is_never_copied_and_what_it_loads_once_at_each_end() {
    if !can_run() {
        return;
    }
    const PAGES: usize = LEN as usize / PAGE_SIZE;
    let nodes = Nodes::start();
    // Beyond the memory of node 0: of node 1.
    let guest = nodes.views[0].map().get_slice(GuestAddress(200 << 20), LEN as usize).unwrap();
    let (buffers, bytes) = (Buffers::one(guest), content(1));
    assert_eq!(nodes.views[0].write(&buffers, &bytes), bytes.len());
    let own = bytes.as_ptr_range();
    let own = own.start as usize..own.end as usize;
    let sent = std::mem::take(&mut *base::lock(&nodes.sent[0]));
    let copied = sent.iter().filter(|&&page| !own.contains(&page)).count();
    assert_eq!((sent.len(), copied), (PAGES, 0), "pages that were sent, and of these copies");
    let totals = || [0, 1].map(|node| nodes.cluster.engine(node).totals());
    let [device, home] = totals();
    assert_eq!((device.stores, device.copied, home.copied), (PAGES as u64, 0, 0));

    let mut read = vec![0xff; bytes.len()];
    assert_eq!(nodes.views[0].read(&buffers, &mut read), bytes.len());
    assert!(read == bytes, "other bytes were read than were stored");
    let [device, home] = totals();
    assert_eq!((device.loads, device.copied, home.copied), (PAGES as u64, PAGES as u64, PAGES as u64));
    // From the middle of that to the middle of a page that nobody has touched.
    let guest = nodes.views[0].map().get_slice(GuestAddress((200 << 20) + 512), LEN as usize).unwrap();
    assert_eq!(nodes.views[0].read(&Buffers::one(guest), &mut read), bytes.len());
    let (stored, untouched) = read.split_at(bytes.len() - 512);
    assert!(stored == &bytes[512..] && untouched == [0; 512], "other bytes than were stored, or none");
    assert_eq!(nodes.cluster.engine(0).totals().loads, 2 * PAGES as u64 + 1);
}

#[test]
fn what_a_cpu_writes_to_another_nodes_disk_it_reads_back() {
    if !can_run() {
        return;
    }
    for (device, direct) in [(0, false), (0, true), (1, false), (1, true)] {
        let nodes = Nodes::start();
        let view = nodes.views[device].clone();
        let view = if direct { view } else { view.without_direct_access() };
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        let disk = RawDisk::open(file.path(), Access::WRITE).unwrap();
        let config = BlockConfig { name: "disk".into(), serial: "s".into(), readonly: false, queues: 2 };
        let block = Box::new(Block::new(Arc::new(disk), config));
        let mut driver = Driver::with(block, view, nodes.views[1 - device].clone());
        driver.start(0);
        let (header, status) = (DATA, DATA + 0x100);
        let request = |driver: &mut Driver, kind: u32, sector: u64, buffer: u64| {
            driver.put(header, &kind.to_le_bytes());
            driver.put(header + 8, &sector.to_le_bytes());
            let data = (buffer, LEN, kind == blk::VIRTIO_BLK_T_IN);
            driver.request((sector / 128 % 2) as u16, &[(header, 16, false), data, (status, 1, true)]);
            assert_eq!(driver.get(status, 1), [0]);
        };
        let (end, mut round, mut busy) = (Instant::now() + FOR, 0, Duration::ZERO);
        while Instant::now() < end {
            round += 1;
            let (sector, bytes) = (round % 200 * 128, content(round));
            driver.put(BUFFERS[0], &bytes);
            let begin = Instant::now();
            request(&mut driver, blk::VIRTIO_BLK_T_OUT, sector, BUFFERS[0]);
            busy += begin.elapsed();
            for buffer in [BUFFERS[1], BUFFERS[0]] {
                let begin = Instant::now();
                request(&mut driver, blk::VIRTIO_BLK_T_IN, sector, buffer);
                busy += begin.elapsed();
                let seen = driver.get(buffer, LEN as usize);
                let wrong = seen.iter().zip(&bytes).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "device on node {device}, round {round}: first wrong byte");
                driver.put(buffer, &content(!round));
            }
        }
        let totals = nodes.cluster.engine(device).totals();
        let (loads, stores) = (totals.loads, totals.stores);
        println!(
            "device on node {device}, direct access {direct}: {round} rounds, {:?} a request, {loads} loads, {stores} stores",
            busy / (3 * round as u32)
        );
        assert_eq!(direct, loads > 0 && stores > 0);
        driver.reset();
    }
}
