//! The mesh, and how it is built: one thread, nonblocking sockets, one deadline for everything.

use std::time::{Duration, Instant};

use super::connecting::{Connecting, Connection, Lanes};
use crate::{FabricError, LaneId, NodeId};

/// The end of a sentence about a peer that has received frames of a lane that is new here.
const NOT_NEW: &str = "it has received frames on this lane before: it is not at the beginning of this run";

/// Finished connections, by lane and node.
pub(super) type Connections = Vec<Vec<Option<Connection>>>;

/// A mesh that is being built.
struct Mesh {
    own: NodeId,
    several_rails: bool,
    connections: Connections,
    /// How many are missing in `connections`.
    missing: usize,
    /// The last failure with each node, for the operator.
    trouble: Vec<Option<String>>,
}

/// Runs until every lane has its connection.
pub(super) fn build(connecting: &mut Connecting, timeout: Duration) -> Result<Connections, FabricError> {
    let (own, nodes, lanes) =
        (connecting.own.identity.node, connecting.own.identity.nodes, connecting.own.identity.lanes);
    let deadline = Instant::now() + timeout;
    let mut mesh = Mesh {
        own,
        several_rails: connecting.rails() > 1,
        connections: (0..lanes).map(|_| (0..nodes).map(|_| None).collect()).collect(),
        missing: usize::from(lanes) * usize::from(nodes - 1),
        trouble: (0..nodes).map(|_| None).collect(),
    };
    for peer in (0..own.0).map(NodeId) {
        (0..lanes).for_each(|lane| connecting.dial(peer, lane, usize::from(lane), false));
    }
    while mesh.missing > 0 {
        if Instant::now() >= deadline {
            return Err(mesh.timed_out(timeout));
        }
        connecting.expected = mesh.missing;
        connecting.turn(deadline, None, &mut mesh)?;
    }
    connecting.expected = 0;
    Ok(mesh.connections)
}

impl Lanes for Mesh {
    fn received(&mut self, peer: NodeId, lane: LaneId) -> Result<u64, String> {
        let taken = self.connections[usize::from(lane)][peer.index()].is_some();
        // A lane of several rails may have moved already, as seen from a peer whose mesh is complete.
        if taken && !self.several_rails {
            return Err(format!("{peer} is connected on lane {lane} already"));
        }
        Ok(0)
    }

    fn up(&mut self, connection: Connection) {
        let met = &connection.met;
        if met.received != 0 {
            tracing::warn!("connection closed: {NOT_NEW}");
            self.trouble[met.peer.index()] = Some(NOT_NEW.into());
            return;
        }
        let slot = &mut self.connections[usize::from(met.lane)][met.peer.index()];
        if slot.replace(connection).is_none() {
            self.missing -= 1;
        }
    }

    fn failed(&mut self, peer: NodeId, _: Option<LaneId>, why: &str, _: bool) {
        // Perhaps unproven, so it is kept for the operator and otherwise not believed.
        if let Some(trouble) = self.trouble.get_mut(peer.index()) {
            *trouble = Some(why.to_owned());
        }
    }
}

impl Mesh {
    fn timed_out(&self, timeout: Duration) -> FabricError {
        let missing: Vec<String> = (0..self.trouble.len() as u16)
            .map(NodeId)
            .filter(|peer| *peer != self.own)
            .filter_map(|peer| {
                let absent = self.connections.iter().filter(|lane| lane[peer.index()].is_none()).count();
                let seen = match &self.trouble[peer.index()] {
                    Some(why) => why.clone(),
                    None if peer > self.own && absent == self.connections.len() => {
                        "it has not connected to this node".to_owned()
                    }
                    None => format!("{absent} of {} lanes are missing", self.connections.len()),
                };
                (absent > 0).then(|| format!("{peer} ({seen})"))
            })
            .collect();
        FabricError::Setup(format!(
            "after {:.1} s {} still misses {}; see that those nodes run and that their addresses can be \
             reached from here",
            timeout.as_secs_f64(),
            self.own,
            missing.join(", ")
        ))
    }
}
