//! The measurements, over any pair of ends.

use std::time::Instant;

use anyhow::{Result, bail};
use fabric::secure::{Handshake, Pattern, PrivateKey, TAG};

use super::end::End;
use crate::place;
use crate::report::quantiles;

/// Messages that the receiver of a one-way stream may be behind, in steps of which it says that it has them.
const WINDOW: usize = 256;
const STEP: usize = 32;
/// Bytes of what it says then.
const WORD: usize = 16;

/// Runs `near` here and `far` in a thread of its own, each on its CPU and, if the host allows it, before what
/// else runs there.
fn both<T>(
    ends: [Box<dyn End>; 2],
    cpus: &[usize],
    near: impl FnOnce(&mut dyn End) -> Result<T>,
    far: impl FnOnce(&mut dyn End) -> Result<()> + Send,
) -> Result<T> {
    let [mut here, mut there] = ends;
    std::thread::scope(|scope| {
        let far_cpus = place::share(cpus, 1, 2);
        let far = scope.spawn(move || {
            place::pin(&far_cpus);
            place::realtime(Some(2));
            far(&mut *there)?;
            // The near end may still wait for what this one has sent.
            Ok::<_, anyhow::Error>(there)
        });
        place::pin(&place::share(cpus, 0, 2));
        place::realtime(Some(2));
        let measured = near(&mut *here);
        place::realtime(None);
        place::pin(cpus);
        match (measured, far.join()) {
            (_, Err(_)) => bail!("the far end's thread panicked"),
            (Err(error), _) | (Ok(_), Ok(Err(error))) => Err(error),
            (Ok(measured), Ok(Ok(_))) => Ok(measured),
        }
    })
}

/// The median and the 99th percentile of `rounds` round trips of `size` bytes each way, in microseconds.
///
/// # Errors
/// An end fails.
pub fn round_trip(ends: [Box<dyn End>; 2], cpus: &[usize], size: usize, rounds: usize) -> Result<(f64, f64)> {
    let message = vec![7; size];
    let near = |end: &mut dyn End| {
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let began = Instant::now();
            end.send(&message)?;
            end.receive(size, 1)?;
            times.push(began.elapsed().as_nanos() as u64);
        }
        Ok(quantiles(&mut times))
    };
    both(ends, cpus, near, |end| {
        (0..rounds).try_for_each(|_| {
            end.receive(size, 1)?;
            end.send(&message)
        })
    })
}

/// Microseconds for each of `count` messages of `size` bytes that go one way as fast as they can.
///
/// # Errors
/// An end fails.
pub fn one_way(ends: [Box<dyn End>; 2], cpus: &[usize], size: usize, count: usize) -> Result<f64> {
    let message = vec![7; size];
    let count = count / STEP * STEP;
    let near = |end: &mut dyn End| {
        let began = Instant::now();
        let (mut sent, mut known) = (0, 0);
        while known < count {
            while sent < count && sent < known + WINDOW {
                end.send(&message)?;
                sent += 1;
            }
            known += STEP * end.receive(WORD, usize::MAX)?;
        }
        Ok(began.elapsed().as_secs_f64() * 1e6 / count as f64)
    };
    both(ends, cpus, near, |end| {
        let (mut have, mut told) = (0, 0);
        while told < count {
            have += end.receive(size, usize::MAX)?;
            while told + STEP <= have {
                end.send(&[1; WORD])?;
                told += STEP;
            }
        }
        Ok(())
    })
}

/// The median, in microseconds, of `rounds` exchanges of `count` messages of `there` bytes for as many of
/// `back` bytes.
///
/// # Errors
/// An end fails.
pub fn exchange(
    ends: [Box<dyn End>; 2],
    cpus: &[usize],
    count: usize,
    [there, back]: [usize; 2],
    rounds: usize,
) -> Result<f64> {
    let turn = |end: &mut dyn End, message: &[u8]| (0..count).try_for_each(|_| end.send(message));
    let wait = |end: &mut dyn End, size: usize| {
        let mut left = count;
        while left > 0 {
            left -= end.receive(size, left)?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let near = |end: &mut dyn End| {
        let (message, mut times) = (vec![7; there], Vec::with_capacity(rounds));
        for _ in 0..rounds {
            let began = Instant::now();
            turn(end, &message)?;
            wait(end, back)?;
            times.push(began.elapsed().as_nanos() as u64);
        }
        Ok(quantiles(&mut times).0)
    };
    both(ends, cpus, near, |end| {
        let message = vec![7; back];
        (0..rounds).try_for_each(|_| {
            wait(end, there)?;
            turn(end, &message)
        })
    })
}

/// Microseconds for each of `count` messages of `size` bytes that are answered by as many, `outstanding` of
/// them under way at any time.
///
/// # Errors
/// An end fails.
pub fn outstanding(
    ends: [Box<dyn End>; 2],
    cpus: &[usize],
    size: usize,
    outstanding: usize,
    count: usize,
) -> Result<f64> {
    let message = vec![7; size];
    let near = |end: &mut dyn End| {
        let began = Instant::now();
        let (mut sent, mut back) = (0, 0);
        while back < count {
            while sent < count && sent < back + outstanding {
                end.send(&message)?;
                sent += 1;
            }
            back += end.receive(size, usize::MAX)?;
        }
        Ok(began.elapsed().as_secs_f64() * 1e6 / count as f64)
    };
    both(ends, cpus, near, |end| {
        let mut answered = 0;
        while answered < count {
            let came = end.receive(size, usize::MAX)?;
            (0..came).try_for_each(|_| end.send(&message))?;
            answered += came;
        }
        Ok(())
    })
}

/// Microseconds to seal and to open a frame of `size` bytes: what the cipher alone adds to its way. The best
/// of `rounds`.
///
/// # Errors
/// The handshake fails, which it does not.
pub fn cipher(size: usize, rounds: usize) -> Result<f64> {
    const RECORDS: usize = 1000;
    let keys = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]));
    let [near, far] = &keys;
    let mut caller = Handshake::call(Pattern::BothKnown, near, &far.public(), &[])?;
    let mut called = Handshake::answer(Pattern::BothKnown, far, Some(&near.public()), &[])?;
    called.read(&caller.write()?)?;
    caller.read(&called.write()?)?;
    let (mut sealer, mut opener) = (caller.finish()?.sealer, called.finish()?.opener);
    let mut record = vec![7; size + TAG];
    let mut best = f64::INFINITY;
    for _ in 0..rounds {
        let began = Instant::now();
        for _ in 0..RECORDS {
            let tag = sealer.seal(&[0; 4], &mut record[..size])?;
            record[size..].copy_from_slice(&tag);
            opener.open(&[0; 4], &mut record)?;
        }
        best = best.min(began.elapsed().as_secs_f64() * 1e6 / RECORDS as f64);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::super::end::{floor, ours};
    use super::*;
    use crate::choice::Net;
    use crate::fault_path::command::Polling;

    #[test]
    fn the_cipher_is_measured() {
        assert!(cipher(4096, 1).unwrap() > 0.0);
    }

    #[test]
    fn every_transport_and_its_floor_take_every_measurement() {
        let cpus = place::cpus();
        for net in Net::ALL {
            for make in [ours, floor] {
                let ends = || make(net, Polling::Blocking).unwrap();
                assert!(round_trip(ends(), &cpus, 4096, 10).unwrap().0 > 0.0);
                assert!(one_way(ends(), &cpus, 4096, 600).unwrap() > 0.0);
                assert!(outstanding(ends(), &cpus, 64, 8, 100).unwrap() > 0.0);
                assert!(exchange(ends(), &cpus, 8, [4096, 64], 10).unwrap() > 0.0);
            }
        }
    }
}
