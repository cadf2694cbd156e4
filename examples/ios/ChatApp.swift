// The smallest app around MLC's Swift package: loads the first bundled model and prints one answer.
import Foundation
import LocalModels
import MLCSwift
import SwiftUI

@MainActor
final class Chat: ObservableObject {
    @Published var text = ""
    private let engine = MLCEngine()

    func ask(_ question: String) async {
        do {
            let bundle = Bundle.main.bundleURL.appendingPathComponent("bundle")
            guard let model = try LocalModel.all(in: bundle).first, let path = model.path else {
                text = "No model is bundled."
                return
            }
            guard model.fits else {
                text = "\(model.id) needs \(model.bytes / 1_000_000) MB, and iOS grants less."
                return
            }
            await engine.reload(
                modelPath: bundle.appendingPathComponent(path).path, modelLib: model.lib)
            let messages = [ChatCompletionMessage(role: .user, content: question)]
            for await part in await engine.chat.completions.create(messages: messages) {
                text += part.choices.first?.delta.content?.asText() ?? ""
            }
        } catch {
            text = "\(error)"
        }
    }
}

@main
struct ChatApp: App {
    @StateObject private var chat = Chat()

    var body: some Scene {
        WindowGroup {
            ScrollView { Text(chat.text).padding() }
                .task { await chat.ask("Why is the sky blue?") }
        }
    }
}
