// Starts libFuzzer on one function, and ends the run when a promise is broken.
import CFuzzer
import Glibc

/// The function under test. Set once, before libFuzzer starts; C callbacks cannot capture.
private nonisolated(unsafe) var runOne: (UnsafeRawBufferPointer) -> Void = { _ in }

/// Hands the program to libFuzzer, which calls `body` with one input after the other and reads the command line.
public func fuzz(_ body: @escaping (UnsafeRawBufferPointer) -> Void) -> Never {
    runOne = body
    var count = CommandLine.argc
    var arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>? = CommandLine.unsafeArgv
    let status = LLVMFuzzerRunDriver(&count, &arguments) { data, size in
        runOne(UnsafeRawBufferPointer(start: data, count: size))
        return 0
    }
    exit(status)
}

/// Ends the run with a message when what must hold does not.
@inline(__always)
public func require(_ holds: Bool, _ message: @autoclosure () -> String) {
    if !holds { fatalError("broken promise: \(message())") }
}
