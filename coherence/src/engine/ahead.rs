//! Reading ahead of a thread that reads page after page.
//!
//! Two read misses in a row on neighbours begin a *stream*: the pages that follow are asked for before they
//! are touched, a window of them at a time, and mapped as they come. One page of each window, its *marker*,
//! is left unmapped: touching it is a cheap local fault, which shows that the reader has come so far, and the
//! next window is asked for, twice as long. Who stops reading touches no marker, and nothing more is asked
//! for. (Linux reads files ahead in this way, `mm/readahead.c`.)

use std::ops::Range;

use crate::page::{BLOCK, Homes, Page};

/// Pages of a stream's first window.
const FIRST: u64 = 4;
/// Pages of the longest.
const MOST: u64 = 64;
/// Streams that are followed at a time, in each shard.
const STREAMS: usize = 8;

/// Pages to be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The pages' numbers.
    pub pages: Range<u64>,
    /// The one that is not to be mapped before it is touched.
    pub marker: Page,
}

#[derive(Clone, Debug, Default)]
struct Stream {
    /// The miss that would continue the stream.
    next: Page,
    /// The miss whose answer is awaited before the first window is asked for: until then the pages that
    /// follow may come along with it.
    begins_with: Option<Page>,
    marker: Option<Page>,
    /// Length of the next window; 0 for none yet.
    window: u64,
}

/// The streams of a shard.
pub struct ReadAhead {
    homes: Homes,
    streams: [Stream; STREAMS],
    oldest: usize,
}

impl ReadAhead {
    /// No streams yet.
    pub fn new(homes: Homes) -> ReadAhead {
        ReadAhead { homes, streams: Default::default(), oldest: 0 }
    }

    /// A read of the page must ask another node.
    pub fn missed(&mut self, page: Page) {
        let next = Page(page.0 + 1);
        match self.streams.iter_mut().find(|stream| stream.next == page) {
            Some(stream) => {
                let window = stream.window.max(FIRST);
                *stream = Stream { next, begins_with: Some(page), marker: None, window };
            }
            None => {
                self.oldest = (self.oldest + 1) % STREAMS;
                self.streams[self.oldest] = Stream { next, ..Stream::default() };
            }
        }
    }

    /// A page came that was asked for.
    pub fn arrived(&mut self, page: Page) -> Option<Window> {
        let stream = self.streams.iter_mut().find(|stream| stream.begins_with == Some(page))?;
        stream.begins_with = None;
        Self::advance(&self.homes, stream)
    }

    /// A page was touched that was not mapped.
    pub fn touched(&mut self, page: Page) -> Option<Window> {
        let stream = self.streams.iter_mut().find(|stream| stream.marker == Some(page))?;
        stream.window = (stream.window * 2).min(MOST);
        Self::advance(&self.homes, stream)
    }

    fn advance(homes: &Homes, stream: &mut Stream) -> Option<Window> {
        let first = stream.next.0;
        stream.marker = None;
        // What begins a block may be another shard's or another home's, or may not be at all.
        if first.is_multiple_of(BLOCK) || first >= homes.pages() {
            return None;
        }
        let end = homes.range(homes.home(stream.next)).end.min(first.next_multiple_of(BLOCK));
        let pages = first..end.min(first + stream.window);
        stream.next = Page(pages.end);
        let marker = Page(pages.start + (pages.end - pages.start) / 2);
        stream.marker = Some(marker);
        Some(Window { pages, marker })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams() -> ReadAhead {
        ReadAhead::new(Homes::new([1000, 1000]))
    }

    #[test]
    fn the_second_miss_in_a_row_begins_a_stream_when_it_is_answered() {
        let mut ahead = streams();
        ahead.missed(Page(1100));
        assert_eq!(ahead.arrived(Page(1100)), None);
        ahead.missed(Page(1101));
        assert_eq!(ahead.arrived(Page(1101)), Some(Window { pages: 1102..1106, marker: Page(1104) }));
        assert_eq!(ahead.arrived(Page(1101)), None);
    }

    #[test]
    fn windows_grow_while_their_markers_are_touched() {
        let mut ahead = streams();
        ahead.missed(Page(1030));
        ahead.missed(Page(1031));
        let mut window = ahead.arrived(Page(1031)).unwrap();
        let mut lengths = Vec::new();
        while let Some(next) = ahead.touched(window.marker) {
            assert_eq!(next.pages.start, window.pages.end);
            lengths.push(next.pages.end - next.pages.start);
            window = next;
        }
        assert_eq!(lengths[..6], [8, 16, 32, 64, 64, 64]);
        assert_eq!(window.pages.end, 1536);
    }

    #[test]
    fn a_stream_goes_on_with_its_window_in_the_next_block() {
        let mut ahead = streams();
        ahead.missed(Page(1530));
        ahead.missed(Page(1531));
        let window = ahead.arrived(Page(1531)).unwrap();
        assert_eq!(window.pages, 1532..1536);
        assert_eq!(ahead.touched(window.marker), None);
        ahead.missed(Page(1536));
        assert_eq!(ahead.arrived(Page(1536)).unwrap().pages, 1537..1545);
    }

    #[test]
    fn misses_without_neighbours_ask_for_nothing() {
        let mut ahead = streams();
        for i in 0..100 {
            let page = Page(1000 + i * 37 % 1000);
            ahead.missed(page);
            assert_eq!(ahead.arrived(page), None);
            assert_eq!(ahead.touched(page), None);
        }
    }

    #[test]
    fn windows_stay_at_one_home() {
        let mut ahead = streams();
        ahead.missed(Page(996));
        ahead.missed(Page(997));
        assert_eq!(ahead.arrived(Page(997)).unwrap().pages, 998..1000);
    }
}
