//! A part of a transport's lanes as a transport of its own.

use std::sync::Arc;

use crate::{FabricError, LaneId, NodeId, Receiver, Transport, TransportStats};

struct Share {
    whole: Arc<dyn Transport>,
    first: LaneId,
    lanes: usize,
}

/// Shares the lanes of `whole` out, as many to each, in order.
///
/// # Errors
/// [`FabricError::Setup`]: they cannot be shared out evenly.
pub(crate) fn share(
    whole: &Arc<dyn Transport>,
    shares: usize,
) -> Result<Vec<Arc<dyn Transport>>, FabricError> {
    if shares == 0 || whole.lanes() == 0 || !whole.lanes().is_multiple_of(shares) {
        let lanes = whole.lanes();
        return Err(FabricError::Setup(format!("{lanes} lanes of a session cannot serve {shares} rails")));
    }
    let lanes = whole.lanes() / shares;
    let share = |number| Share { whole: whole.clone(), first: (number * lanes) as LaneId, lanes };
    Ok((0..shares).map(|number| Arc::new(share(number)) as Arc<dyn Transport>).collect())
}

impl Transport for Share {
    fn node(&self) -> NodeId {
        self.whole.node()
    }

    fn nodes(&self) -> usize {
        self.whole.nodes()
    }

    fn lanes(&self) -> usize {
        self.lanes
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        debug_assert!(usize::from(lane) < self.lanes);
        self.whole.send(to, self.first + lane, parts)
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        if usize::from(lane) < self.lanes { self.whole.take_receiver(self.first + lane) } else { None }
    }

    fn stats(&self) -> TransportStats {
        self.whole.stats()
    }
}
