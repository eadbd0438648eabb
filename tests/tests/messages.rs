//! The messages of each operation, counted at the engines.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use coherence::stats::Totals;
use coherence::uffd::Uffd;
use tests::engines::Engines;

/// Pages of each node. Far more than a run of untouched pages holds.
const PAGES: u64 = 512;

fn machine(nodes: usize) -> Option<Engines> {
    if let Err(why) = Uffd::open() {
        println!("skipped: {why}");
        return None;
    }
    Some(Engines::start(&vec![PAGES; nodes], 1, Duration::ZERO).unwrap())
}

/// A page whose home is node 1, and which node 1 has written.
fn used(machine: &Engines) -> u64 {
    let page = PAGES + 7;
    machine.page(1, page).store(1, SeqCst);
    page
}

/// Messages that all nodes send because of `what`.
fn messages(machine: &Engines, what: impl FnOnce()) -> u64 {
    let sent = |totals: Vec<Totals>| totals.iter().map(|t| t.messages_sent).sum::<u64>();
    let before = sent(machine.at_rest().unwrap());
    what();
    sent(machine.at_rest().unwrap()) - before
}

#[test]
fn a_clean_miss_is_one_round_trip() {
    for write in [false, true] {
        let Some(machine) = machine(2) else { return };
        let page = used(&machine);
        let touch = || match write {
            true => machine.page(0, page).store(2, SeqCst),
            false => assert_eq!(machine.page(0, page).load(SeqCst), 1),
        };
        assert_eq!(messages(&machine, touch), 2);
        assert_eq!(messages(&machine, touch), 0, "the page is here now");
    }
}

#[test]
fn a_page_that_a_third_node_modified_comes_in_three_messages() {
    let Some(machine) = machine(3) else { return };
    let page = used(&machine);
    machine.page(2, page).store(2, SeqCst);
    assert_eq!(messages(&machine, || machine.page(0, page).store(3, SeqCst)), 3);
    // A reader's page is also written home, which the reader does not wait for.
    assert_eq!(messages(&machine, || assert_eq!(machine.page(2, page).load(SeqCst), 3)), 4);
}

#[test]
fn an_upgrade_asks_each_sharer_once_and_moves_no_page() {
    for sharers in [1, 2, 4, 8] {
        let Some(machine) = machine(sharers as usize + 1) else { return };
        let page = used(&machine);
        for node in (0..=sharers as usize).filter(|&node| node != 1) {
            assert_eq!(machine.page(node, page).load(SeqCst), 1);
        }
        let bytes = |totals: &[Totals]| totals.iter().map(|t| t.pages_sent + t.zero_pages_sent).sum::<u64>();
        let before = bytes(&machine.at_rest().unwrap());
        let sent = messages(&machine, || machine.page(0, page).store(2, SeqCst));
        // Request and grant; the home tells all sharers but itself; each sharer answers the writer, the home
        // with its grant or by a message of its own.
        let least = 2 + 2 * (sharers - 1);
        assert!((least..=least + 1).contains(&sent), "{sent} messages for {sharers} sharers");
        let after = machine.at_rest().unwrap();
        assert_eq!(bytes(&after), before, "an upgrade moved a page");
        assert_eq!(after.iter().map(|t| t.invalidations).sum::<u64>(), sharers);
    }
}

#[test]
fn a_page_that_goes_home_and_back_costs_two_messages_each_way() {
    let Some(machine) = machine(2) else { return };
    let page = used(&machine);
    for round in 2..6 {
        for node in [0, 1] {
            assert_eq!(messages(&machine, || machine.page(node, page).store(round, SeqCst)), 2);
        }
    }
}

#[test]
fn untouched_neighbours_come_with_the_page() {
    let Some(machine) = machine(2) else { return };
    let page = |i| PAGES + 64 + i;
    let sent = messages(&machine, || (0..8).for_each(|i| machine.page(0, page(i)).store(i, SeqCst)));
    assert_eq!(sent, 2);
}

#[test]
fn memory_at_home_that_nobody_else_asked_for_costs_no_message_and_no_event() {
    let Some(machine) = machine(2) else { return };
    assert_eq!(messages(&machine, || (0..PAGES).for_each(|p| machine.page(0, p).store(p, SeqCst))), 0);
    assert_eq!(machine.at_rest().unwrap()[0].events, 0);
    // And it is watched all the same: the first that another node asks for is given up.
    assert_eq!(machine.page(1, 5).load(SeqCst), 5);
    machine.page(0, 5).store(6, SeqCst);
    assert!(machine.at_rest().unwrap()[0].events > 0);
}

#[test]
fn a_reader_that_goes_from_page_to_page_finds_most_of_them_there() {
    let Some(machine) = machine(2) else { return };
    let pages = PAGES..PAGES + 400;
    pages.clone().for_each(|page| machine.page(1, page).store(page, SeqCst));
    pages.clone().for_each(|page| assert_eq!(machine.page(0, page).load(SeqCst), page));
    let totals = machine.at_rest().unwrap();
    // A window is asked for while the one before it is read: its reader may be quicker than it, but for few.
    let faults = totals[0].remote_read_faults;
    assert!(faults < 100, "{faults} faults for 400 pages");
    let sent: u64 = totals.iter().map(|t| t.messages_sent).sum();
    assert!((800..=800 + 256).contains(&sent), "{sent} messages for 400 pages");
    // What was read ahead is coherent like any other copy.
    pages.clone().for_each(|page| machine.page(1, page).store(page + 1, SeqCst));
    pages.for_each(|page| assert_eq!(machine.page(0, page).load(SeqCst), page + 1));
}

#[test]
fn a_reader_without_order_is_sent_what_it_asks_for_and_no_more() {
    let Some(machine) = machine(2) else { return };
    let page = |i: u64| PAGES + i * 37 % 400;
    (0..400).for_each(|i| machine.page(1, page(i)).store(i + 1, SeqCst));
    let read = || (0..100).for_each(|i| assert_eq!(machine.page(0, page(i)).load(SeqCst), i + 1));
    assert_eq!(messages(&machine, read), 200);
}
