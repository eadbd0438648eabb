//! Frames over TCP: one connection per lane and peer.
