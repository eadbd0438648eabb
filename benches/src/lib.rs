//! Benches that compare Gestalt with a floor or a peer measured in the same run. There are none yet: the
//! fabric's costs are measured by its examples (`fabric/examples`), the fault path by nothing so far.
