//! That the hold policy lets every thread get on, by going through all that can happen at a few nodes and pages.
//!
//! Each node has a thread whose instruction needs all pages, in an order of its own. A page has a queue of nodes, as its
//! home and the nodes before make one; the first has it. What decides is left open: *any* hold may end too early (a thread
//! got no CPU, or the measure is wrong), any thread may lose its patience. Then the draws are fixed that the policy
//! makes again and again: one node is patient and gets its CPU time, the others give up when they wait. From every state
//! that can be reached, however unlucky the draws were before, every schedule that does not leave out for ever what could
//! happen all the time then retires an instruction of that node. Draws are independent, so that each node has its turn in
//! the end with probability 1.

use std::collections::{HashMap, HashSet};

const NODES: usize = 3;
const PAGES: usize = 3;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    /// Of each page: the node that has it or to which it is on its way, and who comes next.
    queues: [Vec<usize>; PAGES],
    /// The page for which each node waits.
    waits: [Option<usize>; NODES],
    /// Pages that each node holds.
    held: [[bool; PAGES]; NODES],
}

/// What happens, and to which node.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// The thread touches memory: its instruction retires, or a page is missing.
    Touch(usize),
    /// The page comes for which the node waits.
    Arrive(usize),
    /// The thread waits, and its node keeps nothing for it any more.
    GiveUp(usize),
    /// The thread runs or should, and its node keeps nothing for it any more though its instruction has not retired.
    CutShort(usize),
}

/// How nodes hold their pages.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Draws {
    /// Anything may be.
    Any,
    /// This node is patient, the others are not; nothing is cut short.
    Patient(usize),
    /// Nobody is patient.
    Nobody,
    /// Everybody is.
    Everybody,
}

struct Model {
    nodes: usize,
    pages: usize,
}

impl Model {
    /// The pages of a node's instruction, in its order.
    fn order(&self, node: usize) -> impl Iterator<Item = usize> {
        let pages = self.pages;
        (0..pages).map(move |i| if node.is_multiple_of(2) { i } else { pages - 1 - i })
    }

    fn start(&self) -> State {
        let mut state = State::default();
        // Each page is at some node.
        (0..self.pages).for_each(|page| state.queues[page].push(page % self.nodes));
        state
    }

    fn has(state: &State, node: usize, page: usize) -> bool {
        state.queues[page].first() == Some(&node) && state.waits[node] != Some(page)
    }

    /// A node holds nothing any more: what others wait for goes.
    fn let_go(&self, state: &mut State, node: usize) {
        state.held[node] = [false; PAGES];
        for page in 0..self.pages {
            if Model::has(state, node, page) && state.queues[page].len() > 1 {
                state.queues[page].remove(0);
            }
        }
    }

    fn enabled(&self, state: &State, draws: Draws) -> Vec<Action> {
        let mut actions = Vec::new();
        for node in 0..self.nodes {
            let wanted = (0..self.pages).any(|page| state.held[node][page] && state.queues[page].len() > 1);
            let patient = match draws {
                Draws::Any => None,
                Draws::Patient(it) => Some(it == node),
                Draws::Nobody => Some(false),
                Draws::Everybody => Some(true),
            };
            match state.waits[node] {
                None => {
                    actions.push(Action::Touch(node));
                    if wanted && matches!(draws, Draws::Any | Draws::Nobody) {
                        actions.push(Action::CutShort(node));
                    }
                }
                Some(page) => {
                    if state.queues[page].first() == Some(&node) {
                        actions.push(Action::Arrive(node));
                    }
                    if wanted && patient != Some(true) {
                        actions.push(Action::GiveUp(node));
                    }
                }
            }
        }
        actions
    }

    /// The state after the action, and whose instruction retired.
    fn next(&self, state: &State, action: Action) -> (State, Option<usize>) {
        let mut state = state.clone();
        match action {
            Action::Touch(node) => match self.order(node).find(|&page| !Model::has(&state, node, page)) {
                None => {
                    self.let_go(&mut state, node);
                    return (state, Some(node));
                }
                Some(page) => {
                    state.queues[page].push(node);
                    state.waits[node] = Some(page);
                    // Its owner gives it at once if it does not hold it.
                    let owner = state.queues[page][0];
                    if Model::has(&state, owner, page) && !state.held[owner][page] {
                        state.queues[page].remove(0);
                    }
                }
            },
            Action::Arrive(node) => {
                let page = state.waits[node].take().unwrap();
                state.held[node][page] = true;
            }
            Action::GiveUp(node) | Action::CutShort(node) => self.let_go(&mut state, node),
        }
        (state, None)
    }

    /// All states that can be reached.
    fn reachable(&self, draws: Draws) -> Vec<State> {
        let (mut seen, mut todo) = (HashSet::from([self.start()]), vec![self.start()]);
        let mut all = Vec::new();
        while let Some(state) = todo.pop() {
            for action in self.enabled(&state, draws) {
                let next = self.next(&state, action).0;
                if seen.insert(next.clone()) {
                    todo.push(next);
                }
            }
            all.push(state);
        }
        all
    }

    /// How a schedule can go on for ever without an instruction of `whose` nodes, if one can that leaves out nothing that
    /// could happen all the time; or a state in which nothing can happen.
    fn standstill(&self, states: &[State], draws: Draws, whose: &[usize]) -> Option<String> {
        let index: HashMap<&State, usize> = states.iter().zip(0..).collect();
        let enabled: Vec<Vec<Action>> = states.iter().map(|state| self.enabled(state, draws)).collect();
        let edges: Vec<Vec<(Action, usize)>> = (0..states.len())
            .map(|i| {
                let next = |&action: &Action| {
                    let (next, retired) = self.next(&states[i], action);
                    retired.is_none_or(|node| !whose.contains(&node)).then(|| (action, index[&next]))
                };
                enabled[i].iter().filter_map(next).collect()
            })
            .collect();
        if let Some(i) = (0..states.len()).find(|&i| enabled[i].is_empty()) {
            return Some(format!("nothing can happen in {:?}", states[i]));
        }
        for component in components(&edges) {
            let inside: HashSet<usize> = component.iter().copied().collect();
            let taken: HashSet<Action> = component
                .iter()
                .flat_map(|&i| edges[i].iter().filter(|edge| inside.contains(&edge.1)).map(|edge| edge.0))
                .collect();
            let left_out = |action: &&Action| {
                component.iter().all(|&i| enabled[i].contains(action)) && !taken.contains(action)
            };
            if !taken.is_empty() && !enabled[component[0]].iter().any(|action| left_out(&action)) {
                return Some(format!(
                    "{} states by {taken:?}, one {:?}",
                    component.len(),
                    states[component[0]]
                ));
            }
        }
        None
    }
}

/// The strongly connected components of a graph (Tarjan 1972), without recursion.
fn components(edges: &[Vec<(Action, usize)>]) -> Vec<Vec<usize>> {
    const NEW: usize = usize::MAX;
    let (mut number, mut low) = (vec![NEW; edges.len()], vec![0; edges.len()]);
    let (mut on_stack, mut stack, mut found, mut count) = (vec![false; edges.len()], vec![], vec![], 0);
    for root in 0..edges.len() {
        let mut path = if number[root] == NEW { vec![(root, 0)] } else { vec![] };
        while let Some((at, edge)) = path.pop() {
            if edge == 0 && number[at] == NEW {
                (number[at], low[at], on_stack[at]) = (count, count, true);
                count += 1;
                stack.push(at);
            }
            if let Some(&(_, next)) = edges[at].get(edge) {
                path.push((at, edge + 1));
                if number[next] == NEW {
                    path.push((next, 0));
                } else if on_stack[next] {
                    low[at] = low[at].min(number[next]);
                }
                continue;
            }
            if low[at] == number[at] {
                let from = stack.iter().position(|&state| state == at).unwrap();
                let component = stack.split_off(from);
                component.iter().for_each(|&state| on_stack[state] = false);
                found.push(component);
            }
            if let Some(&(above, _)) = path.last() {
                low[above] = low[above].min(low[at]);
            }
        }
    }
    found
}

#[test]
fn whatever_was_drawn_before_the_node_whose_turn_it_is_to_be_patient_gets_on() {
    for (nodes, pages) in [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)] {
        let model = Model { nodes, pages };
        let states = model.reachable(Draws::Any);
        println!("{nodes} nodes, {pages} pages: {} states", states.len());
        for node in 0..nodes {
            assert_eq!(model.standstill(&states, Draws::Patient(node), &[node]), None);
        }
    }
}

#[test]
fn without_patience_nodes_can_steal_from_each_other_for_ever() {
    let model = Model { nodes: 2, pages: 2 };
    let states = model.reachable(Draws::Any);
    assert!(model.standstill(&states, Draws::Nobody, &[0, 1]).is_some());
}

#[test]
fn with_patience_alone_nodes_can_wait_for_each_other_for_ever() {
    let model = Model { nodes: 2, pages: 2 };
    let states = model.reachable(Draws::Any);
    let found = model.standstill(&states, Draws::Everybody, &[0, 1]).unwrap();
    assert!(found.starts_with("nothing can happen"), "{found}");
}
