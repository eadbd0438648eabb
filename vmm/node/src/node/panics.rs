//! A panic in any thread of a node ends the node, and the machine with that cause.

use std::time::Duration;

use crossbeam::channel::Sender;

use super::Event;
use machine::control::{Control, ToCoordinator};

/// How long a node that has lost a thread gets to end in good order, with a dump: the coordinator tells it to
/// end.
pub const GRACE: Duration = Duration::from_secs(5);
/// How long last words to the coordinator may take.
const FLUSH: Duration = Duration::from_millis(500);

/// From now on a panic of any thread of this process is an [`Event::Failed`]. Whatever becomes of that, the
/// coordinator has been told and the process has ended after `grace`.
pub fn end_node(control: &Control, events: &Sender<Event>, grace: Duration) {
    let (control, events) = (control.clone(), events.clone());
    base::panic::on_first_panic(move |why| {
        let (last_words, why) = (control.clone(), why.to_owned());
        if base::thread::id() == std::process::id() as i32 {
            // Who would handle the event is the main thread itself.
            end(&last_words, why);
        }
        // Nobody listens any more if the node is ending.
        let _ = events.send(Event::Failed { why: why.clone(), dump: String::new() });
        let patient = move || {
            std::thread::sleep(grace);
            end(&last_words, why);
        };
        if std::thread::Builder::new().name("last words".into()).spawn(patient).is_err() {
            std::process::exit(1);
        }
    });
}

fn end(control: &Control, why: String) -> ! {
    // A coordinator that is gone needs not be told.
    let _ = control.send(ToCoordinator::Failed { why, dump: None });
    control.flush(FLUSH);
    std::process::exit(1)
}
