//! The messages between nodes and the coordinator, from any bytes: one that decodes is the same after
//! encoding and decoding it again.
#![no_main]
use std::fmt::Debug;

use machine::control::wire::{self, Assigned, Hello, MAX_HELLO};
use machine::control::{FromCoordinator, ToCoordinator};

fn decode<T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + Debug>(frame: &[u8]) {
    if let Ok(message) = wire::decode::<T>(frame) {
        let again = wire::encode(&message).expect("what was decoded can be encoded");
        assert_eq!(wire::decode::<T>(&again).expect("and decoded again"), message);
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut stream = data;
    while let Ok(frame) = wire::read_frame(&mut stream, MAX_HELLO) {
        decode::<Hello>(&frame);
        decode::<ToCoordinator>(&frame);
        decode::<FromCoordinator>(&frame);
        decode::<Assigned>(&frame);
    }
});
