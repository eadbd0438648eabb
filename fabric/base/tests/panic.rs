//! Panics of threads of every kind reach the hook. One test: the hook is the process's.

use std::sync::mpsc::channel;
use std::thread;

#[test]
fn the_first_panic_is_told_whichever_thread_it_is_in_and_even_if_somebody_catches_it() {
    let (tell, told) = channel();
    let begin = || {
        let tell = tell.clone();
        base::panic::on_first_panic(move |why| tell.send(why.to_owned()).unwrap());
    };

    begin();
    let named = thread::Builder::new().name("disk 3".into()).spawn(|| panic!("sector {}", 7)).unwrap();
    assert!(named.join().is_err());
    let why = told.try_recv().unwrap();
    assert!(why.contains(r#"thread "disk 3" panicked at"#), "{why}");
    assert!(why.contains("tests/panic.rs:") && why.contains(": sector 7;"), "{why}");

    begin();
    assert!(thread::spawn(|| panic!("no name")).join().is_err());
    assert!(told.try_recv().unwrap().contains(r#""without a name" panicked"#));

    begin();
    thread::scope(|scope| assert!(scope.spawn(|| std::hint::black_box(None::<u8>).unwrap()).join().is_err()));
    assert!(told.try_recv().unwrap().contains("called `Option::unwrap()` on a `None` value"));

    begin();
    let caught = std::panic::catch_unwind(|| std::panic::panic_any(5));
    assert!(caught.is_err());
    assert!(told.try_recv().unwrap().contains("no message"));

    assert!(thread::spawn(|| panic!("a second one")).join().is_err());
    assert!(told.try_recv().is_err(), "what follows from the first panic is not told");
}
