//! Key files, from any text: a key that was read is the same after writing and reading it again.
#![no_main]
use machine::keys::KeyFile;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(key) = KeyFile::parse(text) {
        let again = KeyFile::parse(&key.text()).expect("a key's own text is a key");
        assert_eq!(*again.text(), *key.text());
    }
});
