//! Operators' requests to a running machine, from any bytes: one that was read is the same after writing and
//! reading it again, and is done, or refused with one line.
#![no_main]
use std::time::Instant;

use gestalt::coordinator::hotplug::{Hotplug, Step};
use machine::config::file;
use gestalt::operator::{Answer, Request, encode, read};

const MACHINE: &str = "kernel = 'k'\n[[node]]\nname = 'n0'\ncpus = 1\nmemory = '128M'\n[entropy]\n[balloon]\n";

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let machine = file::parse(MACHINE).expect("it is a machine").check().expect("that can be");
    let mut hotplug = Hotplug::new(&machine);
    let mut stream = data;
    for asker in 0.. {
        let Ok(request) = read::<Request>(&mut stream) else { return };
        let line = encode(&request).expect("what was read can be written");
        assert_eq!(read::<Request>(&line[..]).expect("and read again"), request);
        for step in hotplug.ask(asker, request, true, Instant::now()) {
            match step {
                Step::Answer(_, Answer::Refused(why)) => assert!(!why.contains('\n'), "{why:?}"),
                Step::Tell { node, id, .. } => drop(hotplug.done(node, id, Ok(None)).expect("it was asked")),
                _ => {}
            }
        }
    }
});
