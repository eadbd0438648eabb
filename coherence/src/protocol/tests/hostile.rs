//! Hostile peers, which send anything that fits the wire form. The protocol refuses messages that make no
//! sense, and whatever it accepts, it never asks for an effect that the engine's unsafe code relies on not
//! being asked for.

use std::sync::Arc;

use fabric::NodeId;
use proptest::prelude::*;

use super::super::classes::tests::classes;
use super::super::message::tests::kinds;
use super::super::operation::tests::operations;
use super::super::*;

/// Pages of each node; the node under test is the second of three.
const PAGES: u64 = 4;
const ME: NodeId = NodeId(1);

#[derive(Clone, Debug)]
enum Input {
    Fault(u64, bool),
    Prefetch(u64, bool),
    Evict(u64),
    Release(u64),
    Hold(u64),
    Discard(u64, u16),
    Load(u64),
    Store(u64),
    FaultMayShip(u64, bool),
    Operate(u64, u32, Operation),
    Class(u64, Class),
    Message(u16, u64, Kind),
    /// What a correct peer would answer to the last question.
    Answer,
}

fn inputs() -> impl Strategy<Value = Vec<Input>> {
    let page = 0..3 * PAGES;
    let input = prop_oneof![
        3 => (page.clone(), any::<bool>()).prop_map(|(page, write)| Input::Fault(page, write)),
        1 => (page.clone(), any::<bool>()).prop_map(|(page, write)| Input::Prefetch(page, write)),
        1 => page.clone().prop_map(Input::Evict),
        2 => page.clone().prop_map(Input::Release),
        1 => page.clone().prop_map(Input::Hold),
        1 => (page.clone(), 0u16..3).prop_map(|(page, run)| Input::Discard(page, run)),
        1 => page.clone().prop_map(Input::Load),
        1 => page.clone().prop_map(Input::Store),
        2 => (page.clone(), any::<bool>()).prop_map(|(page, write)| Input::FaultMayShip(page, write)),
        2 => (page.clone(), 0u32..3, operations())
            .prop_map(|(page, token, operation)| Input::Operate(page, token, operation)),
        1 => (0..PAGES, classes()).prop_map(|(page, class)| Input::Class(PAGES + page, class)),
        3 => (0u16..2, page, kinds(3)).prop_map(|(from, page, kind)| Input::Message(from * 2, page, kind)),
        5 => Just(Input::Answer),
    ];
    proptest::collection::vec(input, 1..120)
}

/// What the guest view maps, as the effects say.
struct View {
    mapped: Vec<Rights>,
    /// What the cache has, mapped or not, is the protocol's to say.
    rights: Vec<Rights>,
    asked: Vec<(NodeId, Message)>,
    /// Operations of this node's CPUs that were not answered yet.
    operations: Vec<(Page, u32)>,
}

impl View {
    fn home(page: Page) -> bool {
        page.0 / PAGES == u64::from(ME.0)
    }

    fn carry_out(&mut self, effects: &[Effect], body: bool) {
        for &effect in effects {
            match effect {
                Effect::Send { to, message } => {
                    assert!(to != ME);
                    if message.kind == Kind::Store {
                        assert!(body, "there are no bytes to store");
                    } else if message.kind.has_body() && message.kind != (Kind::Loaded { body: true }) {
                        assert!(
                            self.mapped[message.page.0 as usize] < Rights::Exclusive,
                            "sent while written"
                        );
                    }
                    self.asked.push((to, message));
                }
                Effect::Land(page) => {
                    assert!(body, "there are no bytes to land");
                    assert_eq!(self.mapped[page.0 as usize], Rights::None, "landed under a mapping");
                }
                Effect::Map(page, rights) => self.mapped[page.0 as usize] = rights,
                Effect::MapZeroes(first, count) => {
                    for page in first.0..first.0 + u64::from(count) {
                        assert_eq!(self.mapped[page as usize], Rights::None, "zeroed under a mapping");
                        self.mapped[page as usize] = Rights::Exclusive;
                    }
                }
                Effect::Unprotect(page) => {
                    let mapped = &mut self.mapped[page.0 as usize];
                    *mapped = if *mapped == Rights::None { Rights::None } else { Rights::Exclusive };
                }
                Effect::Protect(page) => {
                    let mapped = &mut self.mapped[page.0 as usize];
                    *mapped = Rights::Shared.min(*mapped);
                }
                Effect::Unmap(page, _) | Effect::Probe(page) => self.mapped[page.0 as usize] = Rights::None,
                Effect::Free(page) => {
                    assert!(!View::home(page), "the home's frame was freed");
                    assert_eq!(self.mapped[page.0 as usize], Rights::None, "freed under a mapping");
                }
                Effect::Clear(page) => {
                    assert_eq!(self.mapped[page.0 as usize], Rights::None, "cleared under a mapping");
                }
                Effect::Punch(first, count) => {
                    for page in first.0..first.0 + u64::from(count) {
                        assert!(View::home(Page(page)), "punched elsewhere than at home");
                        self.mapped[page as usize] = Rights::Exclusive;
                    }
                }
                Effect::Overwrite(page) => {
                    assert!(body, "there are no bytes to overwrite with");
                    assert!(View::home(page), "overwritten elsewhere than at home");
                }
                Effect::Loaded(_, found) => assert!(body || !found, "there are no bytes that were loaded"),
                // The other nodes' views are not known here, but what this node's cache says is.
                Effect::Operate { to, page, .. } => {
                    assert!(to != ME);
                    assert_eq!(self.rights[page.0 as usize], Rights::Exclusive, "operated on a copy");
                }
                Effect::Operated { page, token, .. } => {
                    let at = self.operations.iter().position(|known| *known == (page, token));
                    self.operations.remove(at.expect("a CPU waits for it"));
                }
                Effect::Ship(page) => {
                    assert_eq!(self.mapped[page.0 as usize], Rights::None, "shipped though it is here");
                }
                Effect::Hold(_) | Effect::Deferred(_) | Effect::Discarded(..) => {}
                Effect::Written(_) | Effect::Stored(..) => {}
            }
        }
    }
}

/// An answer to what was asked.
fn answer(kind: Kind) -> Option<Kind> {
    let data = |rights, run| Some(Kind::Data { rights, acks: 0, body: true, run });
    match kind {
        Kind::GetShared { may_ship: true, .. } | Kind::GetExclusive { may_ship: true, .. } => {
            Some(Kind::Ship)
        }
        Kind::GetShared { run: 0, .. } => data(Rights::Shared, 0),
        Kind::GetShared { run, .. } | Kind::GetExclusive { run, .. } => data(Rights::Exclusive, run),
        Kind::PutShared | Kind::PutExclusive => Some(Kind::PutAck),
        Kind::Data { rights: Rights::Exclusive, .. } => Some(Kind::GetShared { run: 0, may_ship: false }),
        Kind::ForwardShared { .. } => data(Rights::Shared, 0),
        Kind::ForwardExclusive { .. } => data(Rights::Exclusive, 0),
        Kind::Invalidate { .. } => Some(Kind::Ack),
        Kind::Reclaim => data(Rights::Exclusive, 0),
        Kind::Discard { run } => Some(Kind::Discarded { run }),
        Kind::Load | Kind::LoadAt { .. } => Some(Kind::Loaded { body: true }),
        Kind::Store => Some(Kind::Stored { done: true }),
        Kind::Push => Some(Kind::Pushed { taken: true }),
        Kind::Operate { token, .. } | Kind::OperateAt { token, .. } => {
            Some(Kind::Operated { token, old: Some(1.into()) })
        }
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whatever_peers_send_nothing_invalid_is_asked_of_the_engine(
        inputs in inputs(), first in 0u8..3, frames in 1usize..10, ships: bool
    ) {
        let homes = Arc::new(Homes::new([PAGES; 3]));
        let mut node = Protocol::new(ME, homes, 4, RunPolicy { first, most: 3 });
        node.set_budget(frames, Eviction::Clock);
        node.set_shipping(if ships { Shipping::Manual } else { Shipping::Off });
        let mapped = |page| if View::home(Page(page)) { Rights::Exclusive } else { Rights::None };
        let mapped: Vec<_> = (0..3 * PAGES).map(mapped).collect();
        let mut view =
            View { rights: mapped.clone(), mapped, asked: Vec::new(), operations: Vec::new() };
        for input in inputs {
            let mut out = Vec::new();
            let mut body = false;
            match input {
                Input::Fault(page, write) => node.fault(Page(page), write, &mut out),
                Input::Prefetch(page, write) => drop(node.prefetch(Page(page), write, &mut out)),
                Input::Evict(page) => drop(node.evict(Page(page), &mut out)),
                Input::Release(page) => node.release(Page(page), &mut out),
                Input::Hold(page) => node.hold(Page(page)),
                Input::Discard(page, run) => {
                    let run = run.min((PAGES - 1 - page % PAGES) as u16);
                    node.discard(Page(page), run, &mut out);
                }
                Input::FaultMayShip(page, write) => node.fault_may_ship(Page(page), write, &mut out),
                Input::Operate(page, token, operation) => {
                    let asked = Page(page);
                    // Before, so that an answer that comes at once finds it.
                    view.operations.push((asked, token));
                    if !node.operate(asked, token, operation, &mut out) {
                        view.operations.pop();
                    }
                }
                Input::Class(page, class) => node.set_class(Page(page), class),
                Input::Load(page) => drop(node.load(Page(page), &mut out)),
                Input::Store(page) => body = node.store(Page(page), &mut out),
                Input::Answer | Input::Message(..) => {
                    let (from, message) = match input {
                        Input::Message(from, page, kind) => (NodeId(from), Message { page: Page(page), kind }),
                        _ => match view.asked.pop().map(|(to, m)| (to, m.page, answer(m.kind))) {
                            Some((to, page, Some(kind))) => (to, Message { page, kind }),
                            _ => continue,
                        },
                    };
                    body = message.kind.has_body();
                    let zeroes = node.untouched(&message);
                    // What is refused ends the session; go on as if it had not been sent, to get further.
                    let before = node.clone();
                    if node.message(from, message, zeroes, &mut out).is_err() {
                        node = before;
                        continue;
                    }
                    // The engine did this before, which shows only now.
                    for page in message.page.0..message.page.0 + u64::from(zeroes) {
                        view.mapped[page as usize] = Rights::None;
                    }
                }
            }
            if node.violation().is_some() {
                break;
            }
            // An input operates before it gives a page up, or not at all.
            view.carry_out(&out, body);
            view.rights = (0..3 * PAGES).map(|page| node.rights(Page(page))).collect();
            prop_assert!(node.frames() <= frames, "{} frames", node.frames());
        }
        node.describe();
    }
}
