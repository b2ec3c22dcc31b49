// One SCSI command on its way to an iSCSI target, and who waits for it.
import Block
import LinuxIO

/// A command on its way. What it points to stays its caller's until it is finished.
final class ISCSIRequest: @unchecked Sendable {
    // Sendable because `outcome` is touched only under the worker's lock, and the rest only by the worker's thread once
    // the request was handed to it.

    let command: SCSICommand
    /// Where the data goes to; empty for none.
    let data: UnsafeMutableRawBufferPointer
    let worker: ISCSIWorker
    let isFinished = Condition()

    /// What became of it; nil while it is on its way.
    var outcome: Result<SCSIOutcome, BlockError>?

    /// When the target has to have answered, by `monotonicSeconds()`.
    var deadline = 0.0
    /// When not to try again any more; nil while it was never lost.
    var givesUpAt: Double?
    /// Times that the target has not answered in time.
    var silences = 0
    /// Sessions that were lost with this on its way.
    var losses = 0

    init(_ command: SCSICommand, _ data: UnsafeMutableRawBufferPointer, _ worker: ISCSIWorker) {
        self.command = command
        self.data = data
        self.worker = worker
    }
}
