//! The protocol's metadata: at most 0.4 % of guest RAM, over the whole cluster.
//!
//! Guest RAM is at least 90 % of what the nodes may use, so all copies together are at most a ninth of it.
//! The tests spread them as unluckily as they can.

use std::sync::Arc;

use fabric::NodeId;

use super::super::*;
use crate::page::PAGE_SIZE;

/// One page in nine is a copy of another somewhere.
const COPIES: u64 = 9;

/// A home, some of whose pages are shared by `sharers` nodes each, and what these nodes keep for them; in
/// thousandths of a percent of its memory. There are as many copies as there may be.
fn cost(nodes: u16, sharers: u16, write: bool) -> usize {
    const PAGES: u64 = 1 << 16;
    let homes = Arc::new(Homes::new((0..nodes).map(|n| if n == 0 { PAGES } else { 1 << 20 })));
    let chunk = 512;
    let mut home = Protocol::new(NodeId(0), homes.clone(), chunk, RunPolicy::NONE);
    home.set_shipping(Shipping::Auto(Rules::default()));
    (0..PAGES).map(Page).for_each(|page| home.set_class(page, Class::Delegated));
    let mut others: Vec<_> = (0..sharers)
        .map(|n| Protocol::new(NodeId(nodes - 1 - n), homes.clone(), chunk, RunPolicy::NONE))
        .collect();
    // As far from each other as the number of copies lets them be.
    let step = COPIES * u64::from(sharers);
    for page in (0..PAGES).step_by(step as usize).map(Page) {
        for (other, id) in others.iter_mut().zip((0..nodes).rev()) {
            let (mut out, mut answers) = (Vec::new(), Vec::new());
            other.fault(page, write, &mut out);
            let Some(&Effect::Send { message, .. }) = out.first() else { panic!("{out:?}") };
            home.message(NodeId(id), message, 0, &mut answers).unwrap();
            // The home may have won the page in between, and gives it up at once.
            home.release(page, &mut answers);
            let answer = answers.iter().find_map(|effect| match effect {
                Effect::Send { message, .. } => Some(*message),
                _ => None,
            });
            other.message(NodeId(0), answer.unwrap(), 0, &mut out).unwrap();
            other.release(page, &mut out);
            assert!(other.rights(page) != Rights::None && other.is_quiet());
        }
    }
    let bytes = home.metadata_bytes() + others.iter().map(Protocol::metadata_bytes).sum::<usize>();
    bytes * 100_000 / (PAGES as usize * PAGE_SIZE)
}

#[test]
fn metadata_is_at_most_four_thousandths_of_guest_memory() {
    println!("| nodes | copies of each page that has any | metadata, % of guest RAM |");
    println!("|---|---|---|");
    for (nodes, sharers, write) in [
        (2, 1, true),
        (8, 1, false),
        (8, 7, false),
        (64, 1, false),
        (512, 1, false),
        (512, 6, false),
        (512, 7, false),
        (512, 40, false),
    ] {
        let cost = cost(nodes, sharers, write);
        println!("| {nodes} | {sharers} | 0.{cost:03} |");
        assert!(cost <= 400);
    }
}
