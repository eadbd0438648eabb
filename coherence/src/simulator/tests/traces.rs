//! Patterns of access to one page, and the class that the rules give it: soon the one that suits the pattern,
//! and no more changes after that.

use crate::cluster::{Cluster, Seen, Step};
use crate::page::Page;
use crate::protocol::{Class, Kind, Rights, Rules, Shipping};

/// How long a message takes, in microseconds.
const MESSAGE: u64 = 10;

const RULES: Rules = Rules { quick: 1_000, changes: 6, window: 64, cold: 100_000, most: 16 };

/// One access of a trace.
#[derive(Copy, Clone)]
struct Access {
    node: usize,
    write: bool,
    /// Whether the instruction can be shipped.
    shippable: bool,
    /// Microseconds since the last access was done.
    after: u64,
}

/// What became of a part of a trace.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    accesses: u64,
    /// How often the page went from one node to another.
    moves: u64,
    shipped: u64,
    /// How often its class changed.
    changes: u64,
    /// Accesses that did not find the page as they needed it.
    misses: u64,
    messages: u64,
}

/// A trace under way, with the page's home at node 0.
struct Tracer {
    cluster: Cluster,
    now: u64,
    class: Class,
    told: Told,
}

impl Tracer {
    fn new(shipping: Shipping) -> Tracer {
        let cluster = Cluster::new(4, 1).with_shipping(shipping);
        Tracer { cluster, now: 1, class: Class::Moving, told: Told::default() }
    }

    fn step(&mut self, step: Step, seen: &mut Vec<Seen>) {
        self.cluster.set_time(self.now);
        self.cluster.step_seen(step, seen).unwrap();
        let class = self.cluster.class(Page(0));
        self.told.changes += u64::from(std::mem::replace(&mut self.class, class) != class);
    }

    /// Does the access and lets everything come to rest.
    fn access(&mut self, access: Access) {
        let Access { node, write, shippable, after } = access;
        self.now += after;
        self.told.accesses += 1;
        let mut seen = Vec::new();
        let step = match shippable {
            true => Step::Operate { node, cpu: 0, page: Page(0), write },
            false => Step::Access { node, page: Page(0), write },
        };
        self.step(step, &mut seen);
        let done = |seen: &Seen| matches!(seen, Seen::Done { .. } | Seen::Operated { .. });
        self.told.misses += u64::from(!seen.iter().any(done));
        let ready = |step: &Step| !matches!(step, Step::Move { .. });
        while let Some(step) = { self.cluster.pending().find(ready) } {
            if let Step::Deliver { .. } = step {
                self.now += MESSAGE;
            }
            self.step(step, &mut seen);
        }
        self.cluster.check_rest().unwrap();
        for seen in seen {
            match seen {
                Seen::Sent { kind, .. } => {
                    self.told.messages += 1;
                    self.told.moves += u64::from(matches!(kind, Kind::Data { .. }));
                }
                Seen::Operated { shipped: true, .. } => self.told.shipped += 1,
                _ => {}
            }
        }
    }

    /// What came of these accesses.
    fn run(&mut self, accesses: impl Iterator<Item = Access>) -> Told {
        self.told = Told::default();
        accesses.for_each(|access| self.access(access));
        self.told
    }
}

/// Nodes in turn.
fn turns(nodes: &'static [usize], after: u64, count: usize) -> impl Iterator<Item = Access> {
    nodes.iter().cycle().take(count).map(move |&node| Access { node, write: true, shippable: true, after })
}

/// The first and the second half of a trace, and what it would be with the page moving always.
fn halves(name: &str, trace: impl Fn() -> Box<dyn Iterator<Item = Access>>) -> (Told, Told) {
    let count = trace().count();
    let mut tracer = Tracer::new(Shipping::Auto(RULES));
    let first = tracer.run(trace().take(count / 2));
    let second = tracer.run(trace().skip(count / 2));
    let moving = Tracer::new(Shipping::Off).run(trace());
    let told = |t: Told| format!("{} moves, {} shipped, {} changes", t.moves, t.shipped, t.changes);
    println!(
        "| {name} | {count} | {} | {} | {} | {} | {} | {} |",
        told(first),
        told(second),
        first.misses + second.misses,
        moving.misses,
        first.messages + second.messages,
        moving.messages
    );
    (first, second)
}

#[test]
fn the_rules_settle_on_the_class_that_suits_a_trace_and_do_not_swing() {
    println!("| trace | accesses | first half | second half | misses | if moving | messages | if moving |");
    println!("|---|---|---|---|---|---|---|---|");
    // The page goes to another owner after each window of operations, and stays delegated.
    let in_turn = |told: &Told| told.moves <= told.shipped / 60 + 2 && told.changes == 0;
    let (first, second) = halves("two nodes hand a word to and fro", || Box::new(turns(&[1, 2], 5, 20_000)));
    assert!(first.moves < 120 && first.shipped > 4_000, "{first:?}");
    assert!(in_turn(&second), "{second:?}");

    let (_, second) =
        halves("the home and a node hand a word to and fro", || Box::new(turns(&[0, 1], 5, 20_000)));
    assert!(in_turn(&second), "{second:?}");

    let (_, second) = halves("four nodes add to a counter", || Box::new(turns(&[0, 1, 2, 3], 50, 20_000)));
    assert!(in_turn(&second), "{second:?}");

    let (first, second) = halves("nodes work on the page in long turns", || {
        Box::new((0..40_000).map(|i| Access {
            write: true,
            node: 1 + i / 1000 % 2,
            shippable: true,
            after: 5,
        }))
    });
    assert_eq!(first.changes + second.changes, 0);

    let (first, second) = halves("one node alone", || Box::new(turns(&[2], 5, 20_000)));
    assert_eq!((first.moves, second.moves, first.shipped + second.shipped), (1, 0, 0));

    let (_, second) = halves("every other access cannot be shipped", || {
        Box::new((0..20_000).map(|i| Access { write: true, node: 1 + i % 2, shippable: i % 4 < 2, after: 5 }))
    });
    assert!(second.changes <= 10, "{second:?}");

    let (_, second) = halves("one node writes, two read", || {
        let access =
            |i: usize| Access { node: 1 + i % 3, write: i.is_multiple_of(3), shippable: true, after: 20 };
        Box::new((0..30_000).map(access))
    });
    assert!(second.changes == 0 && second.misses < 6_000, "{second:?}");

    // Hot, then one node's alone: it has the page after a window, and nothing moves any more.
    let mut tracer = Tracer::new(Shipping::Auto(RULES));
    tracer.run(turns(&[1, 2, 3], 5, 3_000));
    assert_eq!(tracer.class, Class::Delegated);
    let other = (1..4).find(|&node| tracer.cluster.mapped(node, Page(0)) == Rights::None).unwrap();
    let alone = |after| move |_| Access { node: other, write: true, shippable: true, after };
    let then = tracer.run((0..10_000).map(alone(5)));
    println!("hot, then one node's alone: {} moves, {} shipped", then.moves, then.shipped);
    assert!(then.moves == 1 && then.shipped <= 128, "{then:?}");

    // Hot, then cold, then one node's.
    let mut tracer = Tracer::new(Shipping::Auto(RULES));
    tracer.run(turns(&[1, 2, 3], 5, 3_000));
    let then = tracer.run((0..10).map(alone(200_000)));
    assert_eq!((tracer.class, then.moves), (Class::Moving, 1), "{then:?}");
}

/// Nodes that do nothing but use a page: in the time of one shipped operation its owner does a hundred, and
/// each of the others one, if it does not move. How many operations each node did, and what came of it.
fn counting(nodes: &[usize], rounds: usize) -> (Vec<u64>, Told) {
    let mut tracer = Tracer::new(Shipping::Auto(RULES));
    let mut done = vec![0; nodes.len()];
    for _ in 0..rounds {
        for (done, &node) in done.iter_mut().zip(nodes) {
            for _ in 0..100 {
                let owns = tracer.cluster.mapped(node, Page(0)) == Rights::Exclusive;
                tracer.access(Access { node, write: true, shippable: true, after: 0 });
                *done += 1;
                if !owns {
                    break;
                }
            }
        }
    }
    (done, tracer.told)
}

#[test]
fn nodes_that_do_nothing_but_count_get_equal_shares_in_the_long_run() {
    for nodes in [&[1, 2][..], &[0, 1], &[0, 1, 2, 3]] {
        let (done, told) = counting(nodes, 3_000);
        let share = done.iter().sum::<u64>() / nodes.len() as u64;
        println!("nodes {nodes:?}: {done:?}, {told:?}");
        assert!(done.iter().all(|&done| done > share / 10 * 9), "{done:?}");
        assert!(told.changes <= 2 && told.moves < 300, "{told:?}");
    }
}
