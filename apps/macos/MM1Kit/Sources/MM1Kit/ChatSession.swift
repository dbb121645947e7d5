import Foundation

#if canImport(Darwin)
    import Observation
#endif

/// A conversation that a view shows: what was said, what is being answered, what went wrong.
// Swift 6.0's libswiftObservation does not link on Linux, where no view observes it.
#if canImport(Darwin)
    @Observable
#endif
@MainActor
public final class ChatSession {
    /// What somebody said, or the model is saying.
    public struct Turn: Identifiable, Sendable {
        public let id = UUID()
        public fileprivate(set) var message: Message
        /// Of an answer that came to its end.
        public fileprivate(set) var finish: Finish?

        public var text: String {
            message.parts.map { part in
                if case .text(let text) = part { text } else { "" }
            }.joined()
        }

        public var pictures: [Picture] {
            message.parts.compactMap { part in
                if case .picture(let picture) = part { picture } else { nil }
            }
        }
    }

    public private(set) var turns: [Turn] = []
    /// Why the last question was not answered, or not to the end.
    public private(set) var problem: String?
    /// How answers are drawn.
    public var options: AnswerOptions

    public var isAnswering: Bool { work != nil }

    private let client: @Sendable () async throws -> MM1Client
    private var work: Task<Void, Never>?

    /// - Parameter client: called for every question, so that a server that was started again
    ///   is found: `{ try await server.client() }`.
    public init(
        options: AnswerOptions = AnswerOptions(),
        client: @escaping @Sendable () async throws -> MM1Client
    ) {
        self.options = options
        self.client = client
    }

    /// Asks, after everything that was said; does nothing while an answer is being written.
    ///
    /// - Returns: the answer's end.
    @discardableResult
    public func ask(_ text: String, _ pictures: [Picture] = []) -> Task<Void, Never>? {
        guard work == nil else { return nil }
        problem = nil
        turns.append(Turn(message: .user(text, pictures)))
        let asked = told
        turns.append(Turn(message: .assistant("")))
        let task = Task {
            do {
                try await write(asked)
            } catch is CancellationError {
                // What was written by then stays: a stop is no fault.
            } catch {
                problem = error.localizedDescription
            }
            if turns.last?.text.isEmpty == true { turns.removeLast() }
            work = nil
        }
        work = task
        return task
    }

    /// What the model is told: a question that was refused or called off, and so has no answer
    /// behind it, is still shown, but would fail every later one, too.
    private var told: [Message] {
        turns.indices.filter { i in
            let isLast = i == turns.count - 1
            return turns[i].message.role != .user || isLast || turns[i + 1].message.role != .user
        }.map { turns[$0].message }
    }

    private func write(_ asked: [Message]) async throws {
        var text = ""
        for try await piece in try await client().stream(asked, options: options) {
            text += piece.text
            turns[turns.count - 1].message = .assistant(text)
            turns[turns.count - 1].finish = piece.finish
        }
    }

    /// Ends the answer that is being written; what there is of it stays.
    ///
    /// - Returns: the answer's end, nil where none was being written.
    @discardableResult
    public func stop() -> Task<Void, Never>? {
        work?.cancel()
        return work
    }

    /// Ends the answer that is being written, and forgets what was said.
    public func clear() async {
        await stop()?.value
        turns.removeAll()
        problem = nil
    }
}
