//! The tests, and what x86-TSO says of them. Names and shapes are those of the `diy` tools (Alglave et al.).

/// A variable.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Var {
    /// The first.
    X,
    /// The second.
    Y,
}

/// One access of a thread. Loads go to the thread's first and second result, in their order.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Store the value.
    W(Var, u8),
    /// Load.
    R(Var),
}

impl Access {
    /// What is accessed.
    pub fn var(self) -> Var {
        match self {
            Access::W(var, _) | Access::R(var) => var,
        }
    }
}

/// How the accesses are made.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Plain `mov`.
    Plain,
    /// With `mfence` between every two.
    Fenced,
    /// Stores are `xchg`, which locks.
    Locked,
}

/// What came of one iteration.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Outcome {
    /// Each thread's two results; 0 where it has fewer.
    pub loads: [[u8; 2]; 4],
    /// `x` and `y` in the end.
    pub last: [u8; 2],
}

/// What TSO says of the outcome that a test is about.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It must never be seen.
    Forbidden,
    /// It may be seen, though no interleaving of the threads explains it.
    Relaxed,
}

/// One test.
#[derive(Clone)]
pub struct Litmus {
    /// Its shape's name.
    pub name: &'static str,
    /// What each thread does.
    pub threads: &'static [&'static [Access]],
    /// The outcome that it is about.
    pub about: fn(&Outcome) -> bool,
    /// What TSO says of it when the accesses are plain.
    pub plain: Verdict,
    /// Whether fences or locks make a difference to its threads at all.
    pub varies: bool,
}

impl Litmus {
    /// What TSO says of the outcome in this variant: fences and locks forbid what is relaxed.
    pub fn verdict(&self, variant: Variant) -> Verdict {
        if variant == Variant::Plain { self.plain } else { Verdict::Forbidden }
    }

    /// The variants that differ.
    pub fn variants(&self) -> &'static [Variant] {
        let all = &[Variant::Plain, Variant::Fenced, Variant::Locked];
        if self.varies { all } else { &all[..1] }
    }

    /// The test's name with its variant's.
    pub fn title(&self, variant: Variant) -> String {
        match variant {
            Variant::Plain => self.name.to_owned(),
            Variant::Fenced => format!("{}+mfences", self.name),
            Variant::Locked => format!("{}+xchgs", self.name),
        }
    }
}

use Access::{R, W};
use Var::{X, Y};
use Verdict::{Forbidden, Relaxed};

/// All tests.
pub const ALL: &[Litmus] = &[
    Litmus {
        name: "SB",
        threads: &[&[W(X, 1), R(Y)], &[W(Y, 1), R(X)]],
        about: |o| o.loads[0][0] == 0 && o.loads[1][0] == 0,
        plain: Relaxed,
        varies: true,
    },
    Litmus {
        name: "MP",
        threads: &[&[W(X, 1), W(Y, 1)], &[R(Y), R(X)]],
        about: |o| o.loads[1] == [1, 0],
        plain: Forbidden,
        varies: true,
    },
    Litmus {
        name: "LB",
        threads: &[&[R(X), W(Y, 1)], &[R(Y), W(X, 1)]],
        about: |o| o.loads[0][0] == 1 && o.loads[1][0] == 1,
        plain: Forbidden,
        varies: true,
    },
    Litmus {
        name: "2+2W",
        threads: &[&[W(X, 1), W(Y, 2)], &[W(Y, 1), W(X, 2)]],
        about: |o| o.last == [1, 1],
        plain: Forbidden,
        varies: true,
    },
    Litmus {
        name: "R",
        threads: &[&[W(X, 1), W(Y, 1)], &[W(Y, 2), R(X)]],
        about: |o| o.last[1] == 2 && o.loads[1][0] == 0,
        plain: Relaxed,
        varies: true,
    },
    Litmus {
        name: "S",
        threads: &[&[W(X, 2), W(Y, 1)], &[R(Y), W(X, 1)]],
        about: |o| o.last[0] == 2 && o.loads[1][0] == 1,
        plain: Forbidden,
        varies: true,
    },
    Litmus {
        name: "IRIW",
        threads: &[&[W(X, 1)], &[W(Y, 1)], &[R(X), R(Y)], &[R(Y), R(X)]],
        about: |o| o.loads[2] == [1, 0] && o.loads[3] == [1, 0],
        plain: Forbidden,
        varies: true,
    },
    Litmus {
        name: "CoRR",
        threads: &[&[W(X, 1)], &[R(X), R(X)]],
        about: |o| o.loads[1] == [1, 0],
        plain: Forbidden,
        varies: true,
    },
    Litmus {
        name: "CoWW",
        threads: &[&[W(X, 1), W(X, 2)], &[R(X), R(X)]],
        about: |o| o.last[0] != 2 || o.loads[1][0] > o.loads[1][1],
        plain: Forbidden,
        varies: true,
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every outcome of threads whose accesses take effect one after the other, in any interleaving.
    fn interleaved(threads: &[&[Access]]) -> BTreeSet<Outcome> {
        fn go(
            threads: &[&[Access]],
            at: [usize; 4],
            outcome: Outcome,
            loaded: [usize; 4],
            all: &mut BTreeSet<Outcome>,
        ) {
            let mut over = true;
            for (t, accesses) in threads.iter().enumerate() {
                let Some(access) = accesses.get(at[t]) else { continue };
                over = false;
                let (mut at, mut outcome, mut loaded) = (at, outcome, loaded);
                at[t] += 1;
                match *access {
                    W(var, value) => outcome.last[var as usize] = value,
                    R(var) => {
                        outcome.loads[t][loaded[t]] = outcome.last[var as usize];
                        loaded[t] += 1;
                    }
                }
                go(threads, at, outcome, loaded, all);
            }
            if over {
                all.insert(outcome);
            }
        }
        let mut all = BTreeSet::new();
        go(threads, [0; 4], Outcome::default(), [0; 4], &mut all);
        all
    }

    #[test]
    fn no_interleaving_explains_what_a_test_is_about() {
        for test in ALL {
            let outcomes = interleaved(test.threads);
            assert!(outcomes.len() > 1, "{}", test.name);
            assert!(!outcomes.iter().any(test.about), "{}: an interleaving gives it", test.name);
        }
    }

    #[test]
    fn only_a_load_after_a_store_to_another_variable_may_be_early() {
        for test in ALL {
            let early = test
                .threads
                .iter()
                .any(|accesses| accesses.windows(2).any(|pair| matches!(pair, [W(a, _), R(b)] if a != b)));
            assert_eq!(early, test.plain == Relaxed, "{}", test.name);
        }
    }
}
