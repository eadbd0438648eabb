//! The check of a qcow2 image's consistency, after QEMU's `docs/interop/qcow2.rst`.
//!
//! ```text
//! header ─┬─ refcount table ── refcount blocks: how often each cluster of the file is used
//!         └─ L1 table ── L2 tables ── clusters of the guest's disk
//! ```
//!
//! No cluster may have two uses, none may lie outside of the file, and each that is used must be counted:
//! then whatever is written later goes where nothing else is. Only compressed clusters may share one of the
//! file's, if it is counted for each of them. Clusters that are counted and not used are only lost room. A
//! node that is killed leaves clusters that are used and not counted yet; they are counted before the image
//! is written to. (It makes no compressed ones.) What a failing disk or a stranger makes of an image is
//! refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Sizes of clusters, as powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The most clusters of a file: 16 TiB at the usual 64 KiB. Finding out takes a bit or two for each.
const MOST_CLUSTERS: u64 = 1 << 28;
/// The largest tables, in bytes: QEMU's limits.
const LARGEST_L1: u64 = 32 << 20;
const LARGEST_REFCOUNTS: u64 = 8 << 20;
/// The largest disk, in bytes (256 TiB): far beyond what anybody has, and far from where arithmetic ends.
const LARGEST: u64 = 256 << 40;
/// Where an entry of a table points to.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit of an entry: the cluster is used once.
const COPIED: u64 = 1 << 63;
/// Bit of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit of an L2 entry: the cluster reads as zeroes.
const ZERO: u64 = 1;

/// What a header says, as far as it matters here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// Bytes of the guest's disk.
    pub len: u64,
    cluster_bits: u32,
    l1_entries: u64,
    l1: u64,
    refcounts: u64,
    refcount_clusters: u64,
    /// Bits of one count, as a power of two.
    refcount_order: u32,
}

/// What to do with an image that cannot be used as it is.
const CONVERT: &str = ": make one that stands alone with `qemu-img convert -O qcow2 OLD NEW`";

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// Why an image with this header cannot be used, and what to do.
    pub fn read(file: &File, readonly: bool) -> Result<Header, String> {
        let mut bytes = [0; 104];
        // A header of version 2 has 72 bytes, and the file at least one cluster.
        file.read_exact_at(&mut bytes, 0).map_err(|error| format!("its header cannot be read: {error}"))?;
        if bytes[..4] != *super::MAGIC {
            return Err("it does not begin like one; a raw image must have another name".into());
        }
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let header = Header {
            len: long(24),
            cluster_bits: word(20),
            l1_entries: word(36).into(),
            l1: long(40),
            refcounts: long(48),
            refcount_clusters: word(56).into(),
            refcount_order: if word(4) == 2 { 4 } else { word(96) },
        };
        let (backing, encryption, snapshots) = (long(8), word(32), word(60));
        if backing != 0 {
            return Err(format!("it is based on another image{CONVERT}"));
        }
        if encryption != 0 {
            return Err(format!("it is encrypted{CONVERT}"));
        }
        if snapshots != 0 && !readonly {
            return Err(format!("it has snapshots inside, with which it can only be read{CONVERT}"));
        }
        if header.len > LARGEST {
            return Err(format!("it claims {} bytes, and {LARGEST} are the most", header.len));
        }
        if !CLUSTER_BITS.contains(&header.cluster_bits) || header.refcount_order > 6 {
            return Err("its header has impossible sizes".into());
        }
        Ok(header)
    }
}

/// Reads all tables of an image, whose file has `len` bytes; the clusters that [`Uncounted::count`] should
/// count.
///
/// # Errors
/// What is wrong.
pub fn check(file: &File, len: u64, header: &Header) -> Result<Vec<Uncounted>, String> {
    let found = Check::new(file, len, header).and_then(Check::run);
    found.map_err(|why| format!("it is damaged ({why}): see what `qemu-img check` can mend"))
}

/// A cluster that is used and has a count of 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uncounted {
    /// Where its count is in the file.
    byte: u64,
    /// Bits of the count.
    bits: u64,
    /// For counts of less than a byte: its lowest bit.
    shift: u64,
}

impl Uncounted {
    /// Counts it once.
    ///
    /// # Errors
    /// What the host says.
    pub fn count(&self, file: &File) -> io::Result<()> {
        let mut one = [0; 8];
        let len = (self.bits / 8).max(1) as usize;
        if self.bits < 8 {
            file.read_exact_at(&mut one[..1], self.byte)?;
            one[0] |= 1 << self.shift;
        } else {
            // Most significant byte first.
            one[len - 1] = 1;
        }
        file.write_all_at(&one[..len], self.byte)
    }
}

struct Check<'a> {
    file: &'a File,
    header: &'a Header,
    /// Clusters of the file.
    clusters: u64,
    /// Those that have one use and may have no other.
    used: Bits,
    /// In how many compressed clusters each has a part, `u16::MAX` for that many or more; empty if there are
    /// none.
    packed: Vec<u16>,
}

impl<'a> Check<'a> {
    fn new(file: &'a File, len: u64, header: &'a Header) -> Result<Self, String> {
        let clusters = len.div_ceil(1 << header.cluster_bits);
        if clusters > MOST_CLUSTERS {
            return Err(format!("a file of {clusters} clusters is too long"));
        }
        Ok(Check { file, header, clusters, used: Bits::new(clusters), packed: Vec::new() })
    }

    fn run(mut self) -> Result<Vec<Uncounted>, String> {
        let header = *self.header;
        self.claim(0, 1, "the header")?;
        let len = header.refcount_clusters << header.cluster_bits;
        if len > LARGEST_REFCOUNTS {
            return Err("the refcount table is too large".into());
        }
        self.claim(header.refcounts, header.refcount_clusters, "the refcount table")?;
        let refcounts = self.table(header.refcounts, len / 8)?;
        for &entry in refcounts.iter().filter(|entry| **entry != 0) {
            self.entry(entry, 0, "a refcount block")?;
        }
        self.mapping(&header)?;
        self.counted(&refcounts)
    }

    /// L1 and L2 tables and all that they point to.
    fn mapping(&mut self, header: &Header) -> Result<(), String> {
        let entries = 1u64 << (header.cluster_bits - 3);
        let needed = header.len.div_ceil(entries << header.cluster_bits);
        if header.l1_entries * 8 > LARGEST_L1 || header.l1_entries < needed {
            return Err("the L1 table has a wrong size".into());
        }
        if header.l1_entries == 0 {
            return Ok(());
        }
        let clusters = (header.l1_entries * 8).div_ceil(1 << header.cluster_bits);
        self.claim(header.l1, clusters, "the L1 table")?;
        for entry in self.table(header.l1, header.l1_entries)? {
            if entry == 0 {
                continue;
            }
            self.entry(entry, COPIED, "an L2 table")?;
            for entry in self.table(entry & OFFSET, entries)? {
                if entry & COMPRESSED != 0 {
                    self.compressed(entry)?;
                } else if entry & OFFSET != 0 {
                    self.entry(entry, COPIED | ZERO, "a cluster of the disk")?;
                } else if entry & !ZERO != 0 {
                    return Err(format!("an L2 table has the entry {entry:#x}"));
                }
            }
        }
        Ok(())
    }

    /// A compressed cluster: its offset below, then how many further sectors it touches.
    fn compressed(&mut self, entry: u64) -> Result<(), String> {
        let bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> bits;
        let last = (offset & !511).saturating_add(sectors * 512 + 511);
        let (first, last) = (offset >> self.header.cluster_bits, last >> self.header.cluster_bits);
        if entry & COPIED != 0 || last >= self.clusters {
            return Err(format!("a compressed cluster at {offset:#x} lies outside of the file"));
        }
        if self.packed.is_empty() {
            // Costs memory only where something is counted.
            self.packed = vec![0; self.clusters as usize];
        }
        for uses in &mut self.packed[first as usize..=last as usize] {
            *uses = uses.saturating_add(1);
        }
        Ok(())
    }

    /// The clusters with a use and without a count.
    fn counted(&self, refcounts: &[u64]) -> Result<Vec<Uncounted>, String> {
        let mut uncounted = Vec::new();
        let bits = 1u64 << self.header.refcount_order;
        let in_block = (8u64 << self.header.cluster_bits) / bits;
        let mut block = (u64::MAX, Vec::new());
        for cluster in 0..self.clusters {
            let used = self.used.get(cluster);
            let packed = self.packed.get(cluster as usize).map_or(0, |uses| u64::from(*uses));
            if used && packed > 0 {
                return Err(format!("cluster {cluster} has two uses"));
            }
            if !used && packed == 0 {
                continue;
            }
            let (index, within) = (cluster / in_block, cluster % in_block);
            if block.0 != index {
                let entry = refcounts.get(index as usize).copied().unwrap_or(0);
                if entry == 0 {
                    return Err(format!("cluster {cluster} is used and not counted"));
                }
                block = (index, self.bytes(entry & OFFSET, 1 << self.header.cluster_bits)?);
            }
            let first = (within * bits / 8) as usize;
            let count = match bits {
                1..8 => u64::from(block.1[first] >> (within * bits % 8)) & ((1 << bits) - 1),
                _ => block.1[first..first + bits as usize / 8].iter().fold(0, |n, b| n << 8 | u64::from(*b)),
            };
            if count < packed {
                return Err(format!("cluster {cluster} has {packed} uses and is counted {count} times"));
            }
            if count == 0 {
                let byte = (refcounts[index as usize] & OFFSET) + first as u64;
                uncounted.push(Uncounted { byte, bits, shift: within * bits % 8 });
            }
        }
        Ok(uncounted)
    }

    /// An entry that points to one cluster, with no other bits than `flags`.
    fn entry(&mut self, entry: u64, flags: u64, what: &str) -> Result<(), String> {
        if entry & !(OFFSET | flags) != 0 {
            return Err(format!("the entry of {what} is {entry:#x}"));
        }
        self.claim(entry & OFFSET, 1, what)
    }

    /// Notes the only use of `count` clusters from `offset` on.
    fn claim(&mut self, offset: u64, count: u64, what: &str) -> Result<(), String> {
        let first = offset >> self.header.cluster_bits;
        let last = first.saturating_add(count);
        if !offset.is_multiple_of(1 << self.header.cluster_bits) || last > self.clusters {
            return Err(format!("{what} at {offset:#x} lies outside of the file"));
        }
        match (first..last).find(|cluster| !self.used.set(*cluster)) {
            Some(cluster) => Err(format!("cluster {cluster}, {what}, has two uses")),
            None => Ok(()),
        }
    }

    fn table(&self, offset: u64, entries: u64) -> Result<Vec<u64>, String> {
        let bytes = self.bytes(offset, entries * 8)?;
        Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    /// Bytes of the file; zeroes beyond its end, where the last cluster may go on.
    fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; len as usize];
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(bytes)
    }
}

/// A bit for each cluster.
struct Bits(Vec<u64>);

impl Bits {
    fn new(len: u64) -> Bits {
        Bits(vec![0; len.div_ceil(64) as usize])
    }

    fn get(&self, index: u64) -> bool {
        self.0[(index / 64) as usize] >> (index % 64) & 1 != 0
    }

    /// Sets it; whether it was not set.
    fn set(&mut self, index: u64) -> bool {
        let fresh = !self.get(index);
        self.0[(index / 64) as usize] |= 1 << (index % 64);
        fresh
    }
}
