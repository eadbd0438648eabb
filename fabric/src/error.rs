//! Errors between nodes, as sentences for the operator.

use crate::NodeId;

/// An error of the fabric.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// The peer is gone: it closed the connection, fell silent, or broke the protocol.
    #[error("{peer} was lost: {why}")]
    PeerLost {
        /// The peer.
        peer: NodeId,
        /// The reason, as the end of a sentence.
        why: String,
    },
    /// The mesh could not be set up.
    #[error("the fabric could not be set up: {0}")]
    Setup(String),
    /// A frame that may not be sent: empty, too long, or to a peer or lane that does not exist. A mistake of
    /// the caller; nothing was sent and the session goes on.
    #[error("a frame was refused: {0}")]
    Refused(String),
    /// An operating-system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The error itself.
        source: std::io::Error,
    },
}
