//! The classes of pages at their home: most *move* to the node that uses them; some are *delegated*, stay
//! where they are, and have their users' operations shipped to them ([`super::ship`]); some are *pushed* to
//! their readers after each write ([`super::push`]). [`super::classify`] has the rules.
//!
//! A class says only how the home answers from now on. It may begin and end at any moment, whatever is under
//! way on the page: what was asked before is answered by what the page is when its turn comes.

use fabric::NodeId;

use super::classify::{Classifier, Demanded, Rules};
use super::state::PageMap;
use super::{Entry, Local, Protocol, Rights, Want};
use crate::page::Page;

/// Whether operations are shipped.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Shipping {
    /// Never: all pages move.
    #[default]
    Off,
    /// Where it saves time, as [`Rules`] say; these need [`Protocol::set_time`].
    Auto(Rules),
    /// Where [`Protocol::set_class`] says so, and nowhere else: for tests.
    Manual,
    /// Wherever it is possible, of pages that have left their home once: what nobody but its home has used goes
    /// to the first who wants it. For tests.
    Always,
}

/// How the home treats a page.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Class {
    /// It goes to who wants it.
    #[default]
    Moving,
    /// It stays with its owner, as far as others can do without.
    Delegated,
    /// It goes to who wants it; and when it was written, to those who could read it before, unasked.
    Pushed,
}

/// The pages of this home that are not moving ones, and what decides that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Classes {
    /// All are moving.
    #[default]
    Off,
    Auto(Classifier, u64),
    Manual(PageMap<Class>),
    /// All that have left their home are delegated.
    Always,
}

impl Protocol {
    /// Says whether operations are shipped; at first they are not. The same at every node.
    pub fn set_shipping(&mut self, shipping: Shipping) {
        self.classes = match shipping {
            Shipping::Off => Classes::Off,
            Shipping::Auto(rules) => Classes::Auto(Classifier::new(rules), 0),
            Shipping::Manual => Classes::Manual(PageMap::default()),
            Shipping::Always => Classes::Always,
        };
    }

    /// It is so late now, in microseconds since any moment: for [`Shipping::Auto`], which needs no more than
    /// some hundreds of microseconds of precision.
    pub fn set_time(&mut self, microseconds: u64) {
        if let Classes::Auto(_, now) = &mut self.classes {
            *now = microseconds;
        }
    }

    /// Gives a page of this home a class, if there are any.
    pub fn set_class(&mut self, page: Page, class: Class) {
        if class != Class::Pushed {
            self.readers.remove(page);
        }
        match (&mut self.classes, class) {
            (Classes::Off | Classes::Always, _) => {}
            (Classes::Auto(classifier, now), class) => classifier.tell(page, class, *now),
            (Classes::Manual(pages), Class::Moving) => drop(pages.remove(page)),
            (Classes::Manual(pages), class) => drop(pages.insert(page, class)),
        }
    }

    /// The class of a page of this home.
    pub fn class(&self, page: Page) -> Class {
        match &self.classes {
            Classes::Off => Class::Moving,
            Classes::Auto(classifier, _) => classifier.class(page),
            Classes::Manual(pages) => pages.get(page).copied().unwrap_or_default(),
            Classes::Always if self.has_left(page) => Class::Delegated,
            Classes::Always => Class::Moving,
        }
    }

    /// How many pages of this home are delegated or pushed because it decided so.
    pub fn special(&self) -> usize {
        match &self.classes {
            Classes::Auto(classifier, _) => classifier.special(),
            _ => 0,
        }
    }

    /// Whether a page of this home was ever another node's, since power-on or since it was discarded.
    fn has_left(&self, page: Page) -> bool {
        self.bits(page) & Local::KNOWN != 0
    }

    pub(super) fn is_delegated(&self, page: Page) -> bool {
        self.class(page) == Class::Delegated
    }

    /// Whether anything is shipped.
    pub(super) fn ships(&self) -> bool {
        !matches!(self.classes, Classes::Off)
    }

    /// The home is about to answer a Get; whether the page goes to who asks though it is delegated.
    pub(super) fn note_get(&mut self, page: Page, from: NodeId, want: Want) -> bool {
        let (takes, readers) = match self.entry(page) {
            Entry::Exclusive(owner) => (owner != from, 0),
            Entry::Shared(mut others) => {
                others.remove(from);
                (want.rights == Rights::Exclusive && !others.is_empty(), others.len())
            }
        };
        if let Classes::Auto(classifier, now) = &mut self.classes
            && takes
        {
            let (may_ship, write) = (want.may_ship, want.rights == Rights::Exclusive);
            return classifier.wanted(page, Demanded { by: from, may_ship, write, readers }, *now);
        }
        false
    }

    /// Whether those who read a page that is about to be written are to ask themselves this time.
    pub(super) fn surveys(&self, page: Page) -> bool {
        matches!(&self.classes, Classes::Auto(classifier, _) if classifier.surveys(page))
    }

    /// The home is about to see to an operation, which writes or does not; whether the node that makes it is
    /// to ask for the page instead.
    pub(super) fn note_operation(&mut self, page: Page, by: NodeId, writes: bool) -> bool {
        match &mut self.classes {
            Classes::Auto(classifier, now) => classifier.operated(page, by, writes, *now),
            _ => false,
        }
    }

    /// Bytes that the classes take.
    pub(super) fn classes_bytes(&self) -> usize {
        match &self.classes {
            Classes::Auto(classifier, _) => classifier.bytes(),
            _ => 0,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any class.
    pub fn classes() -> impl Strategy<Value = Class> {
        proptest::sample::select(vec![Class::Moving, Class::Delegated, Class::Pushed])
    }
}
