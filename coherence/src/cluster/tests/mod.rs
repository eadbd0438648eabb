//! The protocol in small clusters: all states of them ([`model`]), and mistakes that must be found
//! ([`mistakes`]).

mod mistakes;
mod model;
