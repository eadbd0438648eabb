//! Memory balloon (5.5): memory that the guest does not use costs its nodes nothing.
//!
//! *Reporting*: the driver reports memory that is free; its pages are given up before the report is answered,
//! and the guest may use them again from then on: they are zero. *Inflating*: the owner asks for memory by
//! the balloon's size, which may change at any time ([`Account`]); the driver takes it from the guest's
//! programs and puts its pages into the balloon. *Deflating* needs nothing here: a page that is touched again
//! is there again.
//!
//! The driver's word alone is what gives a page up, and what it gives up is the guest's: a driver that lies
//! loses the guest's own memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use machine::control::GivenUp;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::chain::Chain;
use super::{Activation, GuestRam, LiveQueue, VirtioDevice, Workers, read_block};

/// Feature (5.5.3): the guest may take pages out of the balloon when it runs out of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// Feature: the guest says what it fills free pages with.
const PAGE_POISON: u64 = 1 << 4;
/// Feature: the guest reports free pages.
const REPORTING: u64 = 1 << 5;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 128;
/// Bytes of a page, in which the balloon counts whatever the guest's pages are (5.5.6).
const PAGE: u64 = 4096;
/// Pages of one request to inflate, at most; what is beyond stays as it is. (Linux asks for 256 at most.)
const MOST_PAGES: usize = 4096;

/// Offset of the pages that the driver has put into the balloon.
const ACTUAL: usize = 4;
/// Offset of what the guest fills free pages with.
const POISON: usize = 12;

/// A balloon's account: the size its owner wants, and what the guest has given up.
#[derive(Debug, Default)]
pub struct Account {
    /// Pages that the guest is to put into the balloon.
    target: AtomicU32,
    /// Pages that it says are there.
    actual: AtomicU32,
    /// Bytes that it has reported.
    reported: AtomicU64,
}

impl Account {
    /// The balloon is to take `size` bytes from the guest; 0: only what is free. The driver hears of it by
    /// [`super::VirtioPciDevice::changed`].
    pub fn set_size(&self, size: u64) {
        self.target.store(u32::try_from(size / PAGE).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// What the guest has given up until now.
    pub fn given_up(&self) -> GivenUp {
        let inflated = u64::from(self.actual.load(Ordering::Relaxed)) * PAGE;
        GivenUp { inflated, reported: self.reported.load(Ordering::Relaxed) }
    }
}

/// The device.
pub struct Balloon {
    account: Arc<Account>,
    /// What the guest fills free pages with, and relies on.
    poison: u32,
}

impl Balloon {
    /// A balloon that takes `size` bytes from the guest; 0 for one that only takes what is free.
    pub fn new(size: u64) -> Balloon {
        let account = Arc::new(Account::default());
        account.set_size(size);
        Balloon { account, poison: 0 }
    }

    /// Where the size can be changed.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    fn registers(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0, self.account.target.load(Ordering::Relaxed));
        put(ACTUAL, self.account.actual.load(Ordering::Relaxed));
        put(POISON, self.poison);
        bytes
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn class(&self) -> u32 {
        // Other.
        0xff_0000
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }

    /// To inflate, to deflate, to report. Drivers do not count the queues of features that are not there.
    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_block(&self.registers(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match usize::try_from(offset) {
            Ok(ACTUAL) => self.account.actual.store(value, Ordering::Relaxed),
            Ok(POISON) => self.poison = value,
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation, workers: &mut Workers) -> io::Result<()> {
        // Pages that must not become zero are left alone (5.5.6.8).
        let poisoned = activation.features & PAGE_POISON != 0 && self.poison != 0;
        // A driver begins with an empty balloon.
        self.account.actual.store(0, Ordering::Relaxed);
        let mut queues = activation.queues.into_iter();
        if let Some(inflate) = queues.next().flatten() {
            workers.spawn(move || serve(inflate, |chain, _| inflated(chain)))?;
        }
        if let Some(deflate) = queues.next().flatten() {
            workers.spawn(move || deflate.serve(|_| 0))?;
        }
        if let Some(report) = queues.next().flatten() {
            let account = self.account.clone();
            workers.spawn(move || match poisoned {
                true => report.serve(|_| 0),
                false => serve(report, |chain, ram| {
                    account.reported.fetch_add(chain.writable.len(), Ordering::Relaxed);
                    ram.addresses(&chain.writable)
                }),
            })?;
        }
        Ok(())
    }
}

/// Gives up what `pages` finds in each request. One whose pages were not given up is never answered, for it
/// may yet be: the guest must not use them meanwhile. (The engine has ended then, and ends the node.)
fn serve(queue: LiveQueue, pages: impl Fn(&Chain, &GuestRam) -> Vec<Range<u64>>) {
    let (ram, signals) = (queue.memory().clone(), queue.signals().clone());
    queue.serve_or_keep(|chain| match ram.discard(&whole_pages(pages(chain, &ram))) {
        Ok(()) => Some(0),
        Err(error) => {
            signals.give_up(&error.to_string());
            None
        }
    });
}

/// The pages whose numbers a request to inflate has.
fn inflated(chain: &Chain) -> Vec<Range<u64>> {
    let mut bytes = vec![0; (chain.readable.len() as usize).min(4 * MOST_PAGES)];
    let read = chain.readable.read(&mut bytes);
    let page = |number: &[u8]| {
        let start = number.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)) * PAGE;
        start..start + PAGE
    };
    bytes[..read].chunks_exact(4).map(page).collect()
}

/// The whole pages in these ranges, in order, no page twice, neighbours together.
fn whole_pages(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    for range in &mut ranges {
        *range = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
    }
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{DATA, Driver, RAM};

    /// What the guest's memory holds from [`DATA`] on before anything is given up.
    const FULL: u8 = 0x55;

    fn driver(size: u64) -> Driver {
        let driver = Driver::new(Box::new(Balloon::new(size)));
        driver.put(DATA, &vec![FULL; (RAM - DATA) as usize]);
        driver
    }

    /// The pages from [`DATA`] on whose content was given up; all are full again then.
    fn take(driver: &Driver) -> Vec<Range<u64>> {
        let zero = |start: &u64| driver.get(*start, PAGE as usize).iter().all(|byte| *byte == 0);
        let pages = (DATA..RAM).step_by(PAGE as usize).filter(zero).map(|start| start..start + PAGE);
        let given = whole_pages(pages.collect());
        driver.put(DATA, &vec![FULL; (RAM - DATA) as usize]);
        given
    }

    #[test]
    fn the_driver_reads_the_size_and_notes_how_much_it_gave() {
        let mut driver = driver(10 << 20);
        driver.start(0);
        assert_eq!(driver.read(0x2000, 4), 2560);
        driver.write(0x2004, &99u32.to_le_bytes());
        driver.write(0x2000, &1u32.to_le_bytes());
        driver.write(0x2006, &[1, 2]);
        assert_eq!((driver.read(0x2000, 4), driver.read(0x2004, 4)), (2560, 99));
    }

    #[test]
    fn another_size_is_told_to_the_driver_and_what_it_gave_is_counted() {
        let balloon = Balloon::new(1 << 20);
        let account = balloon.account().clone();
        let mut driver = Driver::new(Box::new(balloon));
        driver.start(0);
        let generation = driver.read(0x15, 1);
        account.set_size(3 << 20);
        driver.transport.changed();
        driver.wait_config_interrupt();
        assert_ne!(driver.read(0x15, 1), generation);
        assert_eq!((driver.read(0x1000, 1), driver.read(0x2000, 4)), (2, 768));
        driver.write(0x2004, &5u32.to_le_bytes());
        driver.request(2, &[(DATA, 8192, true)]);
        assert_eq!(account.given_up(), GivenUp { inflated: 5 * PAGE, reported: 8192 });
        driver.reset();
        driver.start(0);
        assert_eq!(account.given_up().inflated, 0, "a new driver begins with an empty balloon");
    }

    #[test]
    fn inflated_pages_lose_their_content_and_what_is_no_memory_is_left_out() {
        let mut driver = driver(1 << 20);
        driver.start(0);
        let page = |number: u32| (DATA / PAGE) as u32 + number;
        let numbers = [page(9), page(7), page(8), page(3), page(8), u32::MAX, (RAM / PAGE) as u32];
        driver.put(DATA, &numbers.map(u32::to_le_bytes).concat());
        driver.request(0, &[(DATA, 10, false), (DATA + 10, 18, false)]);
        let pages = |range: Range<u64>| DATA + range.start * PAGE..DATA + range.end * PAGE;
        assert_eq!(take(&driver), [pages(3..4), pages(7..10)]);
        driver.put(DATA, &numbers.map(u32::to_le_bytes).concat());
        driver.request(1, &[(DATA, 28, false)]);
        assert!(take(&driver).is_empty(), "deflating gives nothing up");
    }

    #[test]
    fn pages_that_are_given_up_together_are_asked_for_once_each() {
        let ranges = vec![9 * PAGE..10 * PAGE, 7 * PAGE..9 * PAGE, 3 * PAGE..4 * PAGE, 8 * PAGE..9 * PAGE];
        assert_eq!(whole_pages(ranges), [3 * PAGE..4 * PAGE, 7 * PAGE..10 * PAGE]);
    }

    #[test]
    fn reported_memory_is_given_up_in_whole_pages() {
        let mut driver = driver(0);
        driver.start(0);
        driver.request(2, &[(0x6_0000, 0x4000, true), (0x7_0800, 0x1900, true), (0x9_0001, 0x1000, true)]);
        assert_eq!(take(&driver), [0x6_0000..0x6_4000, 0x7_1000..0x7_2000]);
    }

    #[test]
    fn memory_that_could_not_be_given_up_is_never_acknowledged() {
        for (queue, buffer) in [(0, (DATA, 4, false)), (2, (DATA, 0x1000, true))] {
            let plain = driver(1 << 20).memory.clone();
            let broken = plain.clone().that_gives_nothing_up();
            let mut driver = Driver::with(Box::new(Balloon::new(1 << 20)), broken, plain);
            driver.start(0);
            driver.chain(queue, &[buffer]);
            driver.offer(queue, 0);
            driver.wait_broken();
            assert_eq!(driver.given_back(queue), 0, "the guest would use the pages of queue {queue} again");
        }
    }

    #[test]
    fn reported_memory_that_must_keep_its_poison_is_left_alone() {
        let mut driver = driver(0);
        driver.configure(PAGE_POISON);
        driver.write(0x200c, &0xaaaa_aaaau32.to_le_bytes());
        driver.status(0xf);
        driver.request(2, &[(0x6_0000, 0x4000, true)]);
        assert!(take(&driver).is_empty());
        driver.reset();
        driver.write(0x200c, &0u32.to_le_bytes());
        driver.start(PAGE_POISON);
        driver.request(2, &[(0x6_0000, 0x4000, true)]);
        assert_eq!(take(&driver), std::slice::from_ref(&(0x6_0000..0x6_4000)));
    }
}
