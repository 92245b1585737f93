//! Fuzzes the host's side of the conversation with a guest.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::conversation(bytes);
});
