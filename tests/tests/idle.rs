//! The cost of nodes while nothing happens.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use coherence::uffd::Uffd;
use tests::engines::Engines;

const NODES: usize = 4;

/// CPU time of this process so far, in user mode and in the kernel.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The fields after the name, which may hold anything but ends with the last parenthesis: proc(5).
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on x86-64.
    Duration::from_millis(10 * ticks)
}

/// The only test of its program, so that the CPU time of the process is that of the nodes.
#[test]
fn idle_nodes_use_less_than_two_percent_of_a_cpu_each() {
    if let Err(why) = Uffd::open() {
        println!("skipped: {why}");
        return;
    }
    let engines = Engines::start(&[256; NODES], 2, Duration::from_micros(100)).unwrap();
    // So that there are copies, held pages and connections that were used.
    for page in 0..256 * NODES as u64 {
        (0..NODES).for_each(|node| _ = engines.page(node, page).fetch_add(1, SeqCst));
    }
    engines.at_rest().unwrap();
    let (begin, before) = (Instant::now(), cpu_time());
    // What is measured: nothing happens for a while.
    std::thread::sleep(Duration::from_secs(3));
    let share = (cpu_time() - before).as_secs_f64() / begin.elapsed().as_secs_f64() / NODES as f64;
    println!("{:.2} % of a CPU for each node", share * 100.0);
    assert!(share < 0.02, "{:.2} % of a CPU for each node", share * 100.0);
    assert_eq!(engines.page(0, 5).load(SeqCst), NODES as u64);
}
